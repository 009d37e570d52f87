"""How a stage spreads its work, without knowing over what: this process, or a Ray cluster.

A stage plans its batches ahead. Whoever computes a batch writes its result as one Parquet part,
atomically; a part that is there is never computed again. So every batch counts exactly once, and
a run that was killed at any moment continues where it was, whatever it runs on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from qresafe import metrics
from qresafe.artifacts import read_bytes, write_bytes
from qresafe.errors import CorruptArtifactError, located
from qresafe.failure import here
from qresafe.integrity import BLANK, SEAL_KEY, is_sealed, seal_holds, sealed, tell
from qresafe.process_log import log, logged
from qresafe.progress import Progress
from qresafe.storage import children

Row = dict[str, Any]
BatchFunction = Callable[[list[Row]], pa.Table]


@dataclass(frozen=True)
class Batch:
    """Rows that are computed together; the same rows in every run of the same stage."""

    index: int
    rows: list[Row]


class BatchJob(Protocol):
    """Work on batches; it is pickled to the workers, so it holds names and specs, not models."""

    def setup(self, device: str) -> BatchFunction:
        """Load what is needed on `device`, and return what maps rows to a table.

        Args:
            device: "cpu", "cuda" or several GPUs, as `load_model` takes it.
        """


class TrainJob(Protocol):
    """Training; how it runs on a cluster is known to `qresafe.dist.train`."""

    def run_local(self, folder: UPath, progress: Progress) -> None:
        """Train in this process, continuing from what `folder` holds."""


@dataclass(frozen=True)
class Spent:
    """Where one call's wall-clock time went.

    Attributes:
        startup_seconds: Until the first batch began: processes, imports, loading the model.
        compute_seconds: From then on; 0 if every part was there.
        reused: Parts that an earlier run had left.
    """

    startup_seconds: float
    compute_seconds: float
    reused: int


class Runtime(Protocol):
    """Runs the two kinds of work that stages have.

    Attributes:
        startup_seconds: What it took to be ready: 0 in this process, else to reach a cluster.
        workers: The most processes that compute batches at a time.
    """

    startup_seconds: float
    workers: int

    def check(self) -> None:
        """Find out before any work whether there is room for the workers that it will ask for.

        Raises:
            ResourceError: There is not.
        """

    def map_batches(
        self, job: BatchJob, batches: Sequence[Batch], parts: UPath, progress: Progress
    ) -> Spent:
        """Make `part_path(parts, batch.index)` of every batch; parts that are whole stay.

        Calls `progress.advance` by rows; starting and finishing it is up to the stage.
        """

    def train(self, job: TrainJob, folder: UPath, progress: Progress) -> None:
        """Run `job` to its end, continuing from what `folder` holds."""

    def pools(self) -> tuple[Runtime, Runtime] | None:
        """Return the part that answers for W and the one for Q0, at the same time; None: neither.

        They compute batches only, and are not closed.
        """

    def close(self) -> None:
        """Give back what the runtime holds: processes, models, a Ray session of its own."""


class InProcessRuntime:
    """Runs everything in this process (`workers: 0`).

    Args:
        device: As `load_model` takes it.
        threads: CPU threads for batches. The last bits of a matrix product depend on their
            number, so that equal results need equal counts; None leaves torch's own.
    """

    def __init__(self, device: str = "cpu", threads: int | None = None) -> None:
        self.device, self.threads = device, threads
        self.startup_seconds = 0.0
        self.workers = 1

    def check(self) -> None:
        """This process is all that is asked for."""

    def map_batches(
        self, job: BatchJob, batches: Sequence[Batch], parts: UPath, progress: Progress
    ) -> Spent:
        tally = Tally(progress)
        todo = tally.skip_finished(batches, parts)
        if todo:
            with logged(parts, 0), cpu_threads(self.threads):
                function = job.setup(self.device)
                for batch in todo:
                    tally.add(compute_part(function, batch, parts))
        return tally.spent()

    def train(self, job: TrainJob, folder: UPath, progress: Progress) -> None:
        with logged(folder, 0), cpu_threads(self.threads):
            job.run_local(folder, progress)

    def pools(self) -> None:
        """There is one process."""

    def close(self) -> None:
        """Nothing outlives a call here."""


@dataclass(frozen=True)
class Made:
    """What a finished part tells its driver; small, so that results travel by the store."""

    index: int
    rows: int
    new_tokens: int
    began: float  # Unix time

    def row(self) -> Row:
        return dict(vars(self))


def compute_part(function: BatchFunction, batch: Batch, parts: UPath) -> Made:
    """Compute one batch and write its part."""
    began = time.time()
    with located(**here(records=record_ids(batch.rows))):
        table = function(batch.rows)
    write_table(part_path(parts, batch.index), table)
    tokens = sum(table["new_tokens"].to_pylist()) if "new_tokens" in table.column_names else 0
    made = Made(batch.index, len(batch.rows), tokens, began)
    seconds = time.time() - began
    log.info("batch %d: %d rows, %d tokens, %.1f s", made.index, made.rows, tokens, seconds)
    if metrics.recording():
        labels = metrics.place(parts)
        metrics.record("qresafe_batch_seconds", seconds, labels)
        record_batch(made, table, labels)
    return made


def record_batch(made: Made, table: pa.Table, labels: Mapping[str, str]) -> None:
    """Record what a batch has made, and the GPU memory that it took."""
    errors = table["error"] if "error" in table.column_names else ()
    figures = {
        "qresafe_rows": made.rows,
        "qresafe_generated_tokens": made.new_tokens,
        "qresafe_error_rows": len(errors) - errors.null_count if errors else 0,
    }
    for name, value in figures.items():
        metrics.record(name, value, labels)
    record_gpu(labels)


def record_gpu(labels: Mapping[str, str]) -> None:
    """Record this process's GPU memory, if it has a GPU."""
    if not metrics.recording():
        return
    import torch

    if torch.cuda.is_initialized():
        metrics.record("qresafe_gpu_bytes", torch.cuda.max_memory_allocated(), labels)


def record_ids(rows: Sequence[Row]) -> list[str]:
    """Return what a batch's rows are called in messages."""
    return [str(row.get("prompt_id") or row.get("id") or number) for number, row in enumerate(rows)]


class Tally:
    """Counts finished parts for the progress display and keeps the time."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._started = progress, time.time()
        self._first = float("inf")
        self._tokens = self._reused = 0

    def skip_finished(self, batches: Sequence[Batch], parts: UPath) -> list[Batch]:
        """Return the batches whose part is missing or damaged."""
        parts.mkdir(parents=True, exist_ok=True)
        present = {path.name for path in children(parts)}
        done = {
            batch.index
            for batch in batches
            if part_path(parts, batch.index).name in present
            and is_whole(part_path(parts, batch.index))
        }
        self._reused = len(done)
        rows = sum(len(batch.rows) for batch in batches if batch.index in done)
        if rows:
            self._progress.advance(rows, "found finished")
        return [batch for batch in batches if batch.index not in done]

    def add(self, made: Made) -> None:
        """Take note of a new part."""
        self._first = min(self._first, made.began)
        self._tokens += made.new_tokens
        seconds = max(time.time() - self._first, 1e-3)
        note = f"{self._tokens / seconds:.0f} tok/s" if self._tokens else ""
        self._progress.advance(made.rows, note)

    def spent(self) -> Spent:
        now = time.time()
        first = min(max(self._first, self._started), now)  # clocks of other hosts may differ
        return Spent(round(first - self._started, 3), round(now - first, 3), self._reused)


def part_path(parts: UPath, index: int) -> UPath:
    """Return where the result of batch `index` lies."""
    return parts / f"part-{index:05d}.parquet"


def read_parts(parts: UPath, count: int) -> pa.Table:
    """Return the results of batches 0 to `count` - 1, joined."""
    tables = [read_table(part_path(parts, index)) for index in range(count)]
    return pa.concat_tables(tables, promote_options="default")


def write_table(path: UPath, table: pa.Table) -> None:
    """Write a sealed Parquet file that a reader sees whole or not at all."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({SEAL_KEY: BLANK.decode()})
    write_bytes(path, sealed(sink.getvalue().to_pybytes()))


def read_table(path: UPath) -> pa.Table:
    """Read a Parquet file from any storage.

    Raises:
        CorruptArtifactError: It was sealed by `write_table`, and is not as it was written.
    """
    data = read_bytes(path)
    if is_sealed(data) and not seal_holds(data):
        remedy = "run the stage that made it again"
        raise CorruptArtifactError("changed file", where=str(path), remedy=remedy)
    table = pq.read_table(pa.BufferReader(data))
    kept = {k: v for k, v in (table.schema.metadata or {}).items() if k != SEAL_KEY.encode()}
    return table.replace_schema_metadata(kept or None)


def is_whole(path: UPath) -> bool:
    """Return whether a part is there as it was written; damage is told of."""
    try:
        whole = seal_holds(read_bytes(path))
    except FileNotFoundError:
        return False
    if not whole:
        tell(f"damaged file {path}: its batch is computed again")
    return whole


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Let torch use `count` CPU threads for a while; None changes nothing."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
