"""Finished stages made by hand, for tests of what comes after them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from qresafe.artifacts import Artifact, Run
from qresafe.progress import Silent
from qresafe.records import COMPLETION
from qresafe.stages.judge import judge
from qresafe.stages.runtime import InProcessRuntime, write_table

REFUSAL = "I'm sorry, but I can't help with that."
GIBBERISH = "the the the the the the the the the the"


def row(axis: str, index: int, completion: str, **other: Any) -> dict[str, Any]:
    """Return one completion row; `other` overrides its columns."""
    known = {
        "prompt_id": f"{axis}-{index}",
        "axis": axis,
        "prompt": f"{axis} request number {index}",
        "sample": 0,
        "completion": completion,
        "completion_ids": [1, 2],
        "prompt_tokens": 5,
        "new_tokens": 2,
        "finish": "stop",
    }
    return dict.fromkeys(COMPLETION.names) | known | other


def completed(
    run: Run, label: str, rows: Sequence[dict[str, Any]], prompts: str = "p", **spec: Any
) -> Artifact:
    """Return a finished `generate` stage that holds `rows`."""

    def work(folder: Any) -> dict[str, Any]:
        write_table(folder / "completions.parquet", pa.Table.from_pylist(rows, schema=COMPLETION))
        return {"rows": len(rows), "tokens_per_second": 100.0}

    return run.stage(
        "generate",
        spec={"temperature": 0.0, "dtype": "auto"} | spec,
        inputs={"model": label, "prompts": prompts},
        code_version=1,
        work=work,
    )


def arm(
    run: Run,
    label: str,
    rows: Sequence[dict[str, Any]],
    judges: Sequence[str] = ("keyword", "refusal"),
    **options: Any,
) -> tuple[Artifact, Artifact]:
    """Return the finished `generate` and `judge` stages of one arm."""
    made = completed(run, label, rows, **options)
    return made, judge(run, made, judges, Silent())


class Killed(InProcessRuntime):
    """Dies after its first batch."""

    def map_batches(self, job, batches, parts, progress):  # type: ignore[no-untyped-def]
        super().map_batches(job, batches[:1], parts, progress)
        raise KeyboardInterrupt
