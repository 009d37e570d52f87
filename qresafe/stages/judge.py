"""Verdicts on stored completions: judging again never generates again."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from upath import UPath

from qresafe.artifacts import Artifact, Run
from qresafe.errors import DataError
from qresafe.judges.base import Judge, Verdict
from qresafe.progress import Progress
from qresafe.records import COMPLETION, VERDICT
from qresafe.registry import judges as registry
from qresafe.stages.generate import FILE as COMPLETIONS
from qresafe.stages.runtime import Row
from qresafe.stages.streams import count_rows, read_rows, table_writer

CODE_VERSION = 2  # also raised when a judge's rules change
FILE = "verdicts.parquet"
CHUNK = 500  # completions between two signs of progress
READ = pa.schema(
    COMPLETION.field(name)
    for name in ("prompt_id", "sample", "axis", "prompt", "completion", "error")
)
Tally = collections.Counter[tuple[str, str, str]]  # (judge, axis, outcome)


def judge(
    run: Run, completions: Artifact, judges: Sequence[str], progress: Progress, label: str = ""
) -> Artifact:
    """Let every judge look at every completion.

    Args:
        run: Where the result goes.
        completions: A finished `generate` stage.
        judges: Names of the registry, without repetition.
        progress: Told of every chunk of completions.
        label: What the model is called in the display; not part of the key.

    Returns:
        The artefact with verdicts.parquet (`records.VERDICT`): for each judge in turn, one row per
        completion, in the completions' order. A failed generation is *undecided*. The counts hold
        the outcomes by judge and axis.

    Raises:
        SpecError: A judge is not registered.
        DataError: No judge is named, one twice, or the completions lack a column.
    """
    named = {name: registry.get(name) for name in judges}
    if not named or len(named) < len(judges):
        raise DataError(f"judges {list(judges)} are none or repeat", remedy="name each judge once")

    def work(folder: UPath) -> Mapping[str, Any]:
        source = completions.path / COMPLETIONS
        progress.start(f"judge {label}".strip(), count_rows(source) * len(named), "verdicts")
        tally: Tally = collections.Counter()
        with table_writer(folder / FILE, VERDICT) as writer:
            for name, function in named.items():
                for rows in read_rows(source, READ):
                    made = _verdicts(name, function, rows, progress)
                    tally.update((v["judge"], v["axis"], v["outcome"]) for v in made)
                    writer.write(made)
        progress.finish()
        return count_outcomes(tally)

    made = run.stage(
        "judge",
        spec={"judges": list(judges)},
        inputs={"completions": completions.key},
        code_version=CODE_VERSION,
        work=work,
    )
    if made.reused:
        progress.start(f"judge {label}".strip())
        progress.finish(reused=True)
    return made


def verdict_on(function: Judge, row: Row) -> Verdict:
    """Return the judge's verdict on a completion row; an error row is undecided."""
    if row["error"]:
        return Verdict("undecided", f"generation failed: {row['error']}")
    return function(row["axis"], row["prompt"], row["completion"])


def count_outcomes(tally: Tally) -> dict[str, dict[str, dict[str, int]]]:
    """Return judge -> axis -> outcome -> count."""
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for (name, axis, outcome), count in tally.items():
        counts.setdefault(name, {}).setdefault(axis, {})[outcome] = count
    return counts


def _verdicts(name: str, function: Judge, rows: Sequence[Row], progress: Progress) -> list[Row]:
    made = []
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        for row in chunk:
            outcome, reason = verdict_on(function, row)
            kept = {key: row[key] for key in ("prompt_id", "sample", "axis")}
            made.append(kept | {"judge": name, "outcome": outcome, "reason": reason})
        progress.advance(len(chunk))
    return made
