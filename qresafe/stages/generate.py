"""Completions of a table of prompts by one model: planned, computed in batches, put in order."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from upath import UPath

from qresafe.artifacts import Artifact, Run, content_key
from qresafe.benchmarks.base import sources_of
from qresafe.errors import CorruptArtifactError, DataError
from qresafe.hf.batching import length_plan
from qresafe.hf.models import load_tokenizer
from qresafe.hf.warm import ModelInput
from qresafe.progress import Progress
from qresafe.records import COMPLETION, LATER, PROMPT, require_columns
from qresafe.registry import engines
from qresafe.specs import GenerateSpec
from qresafe.stages.engines import Engine
from qresafe.stages.runtime import Batch, Row, Runtime, Spent, read_parts, write_table

CODE_VERSION = 1
FILE = "completions.parquet"
PATIENCE = {"concurrency", "timeout_seconds", "retries"}  # do not change what is asked for


def generate(
    run: Run,
    *,
    label: str,
    model: ModelInput | None,
    prompts: pa.Table,
    spec: GenerateSpec,
    runtime: Runtime,
    progress: Progress,
) -> Artifact:
    """Complete every prompt `spec.samples` times.

    Args:
        run: Where the result goes.
        label: What the model is called in the display ("W", "Q0", ...); not part of the key.
        model: The model; None for engine `openai`, where the endpoint is the model.
        prompts: A table with the columns of `records.PROMPT`; ids are unique.
        spec: How to generate.
        runtime: Where to compute.
        progress: Told of every finished batch.

    Returns:
        The artefact with completions.parquet (`records.COMPLETION`), in the order of `prompts`
        and, within a prompt, of samples. `target_logp` stands in sample 0's row.

    Raises:
        DataError: Empty table, empty prompt, repeated id, or a prompt that exceeds the context.
        ModelError: No chat template, or one that fails; or the endpoint
            cannot be reached or refuses the key.
    """
    sources = sources_of(prompts)
    prompts = check_prompts(prompts)

    def work(folder: UPath) -> Mapping[str, Any]:
        planned = plan(model, prompts, spec)
        parts = folder / "work" / "parts"
        progress.start(f"generate {label}", planned.rows, "completions")
        spent = runtime.map_batches(planned.job, planned.batches, parts, progress)
        table = assemble(prompts, read_parts(parts, len(planned.batches)), spec.samples)
        write_table(folder / FILE, table)
        counts = summary(table, spent) | {"sources": sources}
        counts["chat_template"] = template_key(model)
        progress.finish(f"{counts['new_tokens']} tokens, {counts['errors']} errors")
        return counts

    made = run.stage(
        "generate",
        spec=spec.model_dump(exclude=PATIENCE) | {"dtype": model.ref.dtype if model else None},
        inputs={"model": model.key if model else "", "prompts": table_key(prompts)},
        code_version=CODE_VERSION,
        work=work,
    )
    return made.shown(progress, f"generate {label}")


def template_key(model: ModelInput | None) -> str | None:
    """Return a hash of the chat template that a model's prompts go through; None: not known."""
    if model is None:
        return None
    tokenizer = load_tokenizer(model.ref.path, trust_remote_code=model.ref.trust_remote_code)
    return content_key(tokenizer.chat_template)


def table_key(table: pa.Table) -> str:
    """Return a hash of a table's content; columns of later versions count where they are used."""
    unused = [n for n in LATER if n in table.column_names and table[n].null_count == len(table)]
    return content_key(table.drop_columns(unused).to_pylist())


def check_prompts(prompts: pa.Table) -> pa.Table:
    """Return the table with exactly the columns of `records.PROMPT`.

    Raises:
        DataError: A column is missing, there is no row, an empty prompt or a repeated id.
    """
    table = require_columns(prompts, PROMPT, "the prompts")
    if table.num_rows == 0:
        raise DataError("there are no prompts", remedy="give at least one")
    repeated, times = collections.Counter(table["prompt_id"].to_pylist()).most_common(1)[0]
    if times > 1:
        raise DataError(f"prompt_id {repeated!r} occurs {times} times", remedy="make ids unique")
    for row in table.select(["prompt_id", "prompt"]).to_pylist():
        if not row["prompt"].strip():
            raise DataError("empty prompt", where=f"prompt {row['prompt_id']!r}", remedy="drop it")
    return table


@dataclass(frozen=True)
class Planned:
    """The work of one call: a job and its batches."""

    job: Engine
    batches: list[Batch]

    @property
    def rows(self) -> int:
        return sum(len(batch.rows) for batch in self.batches)


def plan(model: ModelInput | None, prompts: pa.Table, spec: GenerateSpec) -> Planned:
    """Check what the engine needs and group rows of similar length, the longest first.

    The plan depends on nothing but its arguments, so a resumed run finds its parts again.
    """
    job: Engine = engines.get(spec.engine)(model, spec)
    requests = [
        row | {"sample": sample, "target_ids": row["target_ids"] if sample == 0 else []}
        for row in job.requests(prompts.to_pylist())
        for sample in range(spec.samples)
    ]
    return Planned(job, in_batches(requests, spec.batch_size))


def in_batches(requests: Sequence[Row], batch_size: int) -> list[Batch]:
    """Group request rows of similar `size`, the longest first.

    Memory is then short at once or never, and the last batches, which decide when all actors can
    stop together, are the short ones.
    """
    groups = length_plan([row["size"] for row in requests], batch_size)
    return [
        Batch(index, [requests[row] for row in group])
        for index, group in enumerate(reversed(groups))
    ]


def assemble(prompts: pa.Table, answers: pa.Table, samples: int) -> pa.Table:
    """Join answers to their prompts, in the prompts' order.

    Raises:
        CorruptArtifactError: There is not exactly one answer per prompt and sample.
    """
    found = {(row["prompt_id"], row["sample"]): row for row in answers.to_pylist()}
    expected = prompts.num_rows * samples
    if len(found) != expected or answers.num_rows != expected:
        what = f"{answers.num_rows} answers ({len(found)} distinct) instead of {expected}"
        raise CorruptArtifactError(what, where="generate", remedy="delete its folder and run again")
    rows = [
        prompt | found[prompt["prompt_id"], sample]
        for prompt in prompts.to_pylist()
        for sample in range(samples)
    ]
    return pa.Table.from_pylist(rows, schema=COMPLETION)


def summary(completions: pa.Table, spent: Spent) -> dict[str, Any]:
    """Return the manifest's counts: rows, errors by kind, tokens, and where the time went."""
    kinds = collections.Counter(
        error.split(":")[0] for error in completions["error"].to_pylist() if error
    )
    tokens = pc.sum(completions["new_tokens"]).as_py()
    speed = tokens / spent.compute_seconds if spent.compute_seconds and not spent.reused else None
    return {
        "rows": completions.num_rows,
        "errors": sum(kinds.values()),
        "errors_by_kind": dict(sorted(kinds.items())),
        "prompt_tokens": pc.sum(completions["prompt_tokens"]).as_py(),
        "new_tokens": tokens,
        "tokens_per_second": speed and round(speed, 1),  # None for a run that was continued
        "startup_seconds": spent.startup_seconds,
        "compute_seconds": spent.compute_seconds,
        "reused_parts": spent.reused,
    }
