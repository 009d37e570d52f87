"""W and Q0 answer on pools of workers of their own: at the same time, with the same bytes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from ray import cloudpickle
from upath import UPath

from qresafe.dist.runtime import RayRuntime
from qresafe.errors import ModelError
from qresafe.loading import load_spec
from qresafe.progress import Progress, Silent
from qresafe.specs import ExperimentSpec, ResourcesSpec
from qresafe.stages.experiment import Experiment
from qresafe.stages.pools import at_once
from qresafe.stages.runtime import (
    Batch,
    BatchFunction,
    InProcessRuntime,
    Row,
    Runtime,
    part_path,
    read_parts,
)

pytestmark = pytest.mark.ray
NAMES = ("W", "Q0")


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayRuntime]:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    runtime = RayRuntime(ResourcesSpec(workers=2, teacher_workers=1))
    yield runtime
    runtime.close()
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def experiment(storage: Path, w: Path, runtime: Runtime) -> Experiment:
    few = {"harmful": 6, "benign": 3, "borderline": 2, "recombined": 0, "max_new_tokens": 8}
    spec = {
        "storage": str(storage),
        "model": {"path": str(w)},
        "quantize": {"method": "rtn", "bits": 2, "group_size": 32},
        "pairs": few | {"keep": "different"},
        "evaluate": {"generate": {"batch_size": 2}},
    }
    return Experiment(load_spec(ExperimentSpec, spec), runtime)


@pytest.mark.long
def test_pairs_are_those_of_one_after_the_other(
    cluster: RayRuntime, tmp_path: Path, tiny_llama: Path
) -> None:
    found = []
    for folder, runtime in (("one", InProcessRuntime(threads=1)), ("both", cluster)):
        made = experiment(tmp_path / folder, tiny_llama, runtime)
        assert made.quantized  # as in a whole experiment, first
        bytes_ = [(made.pairs.path / "pairs.parquet").read_bytes()]
        stages = [(name, artifact.key) for name, artifact in made.stages]
        for name, artifact in made.stages:
            if name.startswith("generate"):
                bytes_.append((artifact.path / "completions.parquet").read_bytes())
        found.append((stages, bytes_))
    assert found[0] == found[1]
    names = [name for name, _ in found[0][0]]
    assert names == ["quantize", "generate W calibration", "generate Q0 calibration", "pairs"]
    assert len(found[0][1]) == 3


@dataclass(frozen=True)
class Meeting:
    """Every batch notes its process and time; the first waits until the other pool has begun."""

    folder: str
    mine: str
    other: str
    seconds: float = 0.0
    refuse: bool = False

    def setup(self, device: str) -> BatchFunction:
        def compute(rows: list[Row]) -> pa.Table:
            Path(self.folder, self.mine).touch()
            deadline = time.monotonic() + 60
            while not Path(self.folder, self.other).exists():
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{self.other} has not begun")
                time.sleep(0.01)
            if self.refuse:
                raise ModelError("no such model", where=self.mine)
            began = time.time()
            time.sleep(self.seconds)
            columns = {"x": [row["x"] for row in rows], "pid": [os.getpid()] * len(rows)}
            return pa.table(columns | {"began": [began] * len(rows)})

        return compute


def parts_of(folder: Path, name: str) -> UPath:
    return UPath(folder / "runs" / "r" / "generate" / name / "parts")


def both(
    cluster: RayRuntime, folder: Path, count: int, progress: Progress | None = None, **more: Any
) -> list[pa.Table]:
    """Run a job of `count` batches in each pool; return what their parts hold."""

    def task(mine: str, other: str, **own: Any) -> Any:
        def run(pool: Runtime, lane: Progress) -> Any:
            job = Meeting(str(folder), mine, other, **own)
            lane.start(mine, count)
            batches = [Batch(i, [{"x": i}]) for i in range(count)]
            pool.map_batches(job, batches, parts_of(folder, mine), lane)
            lane.finish()
            return read_parts(parts_of(folder, mine), count)

        return run

    tasks = [task("W", "Q0", **more), task("Q0", "W", seconds=0.1)]
    pools = cluster.pools()
    assert pools is not None
    made: Any = at_once(tasks, pools, progress or Silent())
    return list(made)


@pytest.mark.long
def test_pools_overlap_and_share_no_process(cluster: RayRuntime, tmp_path: Path) -> None:
    teacher, student = both(cluster, tmp_path, 5, seconds=0.1)
    for table in (teacher, student):
        assert table["x"].to_pylist() == [0, 1, 2, 3, 4]
    assert not set(teacher["pid"].to_pylist()) & set(student["pid"].to_pylist())
    times = [table["began"].to_pylist() for table in (teacher, student)]
    assert max(map(min, times)) < min(map(max, times))  # each begins before the other ends


class KillWhenSeen(Silent):
    """Kills the process that made W's first part; of both pools it hears together."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.killed = folder, 0

    def advance(self, done: int = 1, note: str = "") -> None:
        first = part_path(parts_of(self.folder, "W"), 0)
        if not self.killed and first.exists():
            self.killed = read_parts(parts_of(self.folder, "W"), 1)["pid"][0].as_py()
            os.kill(self.killed, signal.SIGKILL)


@pytest.mark.long
def test_a_killed_worker_of_one_pool_disturbs_neither(cluster: RayRuntime, tmp_path: Path) -> None:
    progress = KillWhenSeen(tmp_path)
    teacher, student = both(cluster, tmp_path, 6, progress, seconds=0.2)
    assert progress.killed
    for table in (teacher, student):
        assert table["x"].to_pylist() == list(range(6))
    assert len(set(teacher["pid"].to_pylist())) == 2  # before and after
    assert len(set(student["pid"].to_pylist())) == 1


@pytest.mark.long
def test_a_mistake_in_one_pool_ends_both_and_keeps_what_is_done(
    cluster: RayRuntime, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"^no such model in W\.$"):
        both(cluster, tmp_path, 30, refuse=True)
    parts = Path(str(parts_of(tmp_path, "Q0"))).glob("*.parquet")
    kept = {part: part.read_bytes() for part in parts}
    assert 0 < len(kept) < 30
    again = both(cluster, tmp_path, 30)[1]  # continues, and nothing is made twice
    assert again["x"].to_pylist() == list(range(30))
    assert {part: part.read_bytes() for part in kept} == kept
    cpus = ray.cluster_resources()["CPU"]
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != cpus and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources().get("CPU") == cpus
