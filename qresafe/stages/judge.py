"""Verdicts on stored completions: judging again never generates again."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
from upath import UPath

from qresafe.artifacts import Artifact, Run
from qresafe.errors import DataError
from qresafe.judge_specs import JudgeSpec, title_of
from qresafe.judges.base import Judge, Verdict
from qresafe.progress import Progress
from qresafe.records import COMPLETION, VERDICT, require_columns
from qresafe.registry import judges as registry
from qresafe.stages.generate import FILE as COMPLETIONS
from qresafe.stages.runtime import InProcessRuntime, Row, Runtime, read_table, write_table

CODE_VERSION = 1  # also raised when a judge's rules change
FILE = "verdicts.parquet"
CHUNK = 500  # completions between two signs of progress


def judge(
    run: Run,
    completions: Artifact,
    judges: Sequence[JudgeSpec],
    progress: Progress,
    label: str = "",
    runtime: Runtime | None = None,
) -> Artifact:
    """Let every judge look at every completion.

    Args:
        run: Where the result goes.
        completions: A finished `generate` stage.
        judges: Names of the registry and specs of model judges, without repetition. Each model
            judge's answers are a stage of their own (`judge_model`).
        progress: Told of every chunk of completions.
        label: What the model is called in the display; not part of the key.
        runtime: Where model judges run; None: in this process.

    Returns:
        The artefact with verdicts.parquet (`records.VERDICT`): for each judge in turn, one row per
        completion, in the completions' order. A failed generation is *undecided*. The counts hold
        the outcomes by judge and axis.

    Raises:
        SpecError: A judge is not registered.
        DataError: No judge is named, one twice, or the completions lack a column.
        UserError: A judge's model or endpoint is not usable.
    """
    titles = [title_of(spec) for spec in judges]
    if not titles or len(set(titles)) < len(titles):
        raise DataError(f"judges {titles} are none or repeat", remedy="name each judge once")
    rules = {name: registry.get(name) for name in judges if isinstance(name, str)}
    asked = _ask_models(run, completions, judges, runtime or InProcessRuntime(), progress, label)

    def work(folder: UPath) -> Mapping[str, Any]:
        table = require_columns(read_table(completions.path / COMPLETIONS), COMPLETION, COMPLETIONS)
        progress.start(f"judge {label}".strip(), table.num_rows * len(titles), "verdicts")
        rows: list[Row] = []
        for title in titles:
            if title in asked:
                rows += _answered(title, asked[title][0], progress)
            else:
                rows += _verdicts(title, rules[title], table.to_pylist(), progress)
        write_table(folder / FILE, pa.Table.from_pylist(rows, schema=VERDICT))
        progress.finish()
        return count_outcomes(rows)

    made = run.stage(
        "judge",
        # A model judge is named by what its answers depend on: other weights are another judge.
        spec={"judges": [asked[t][1] | {"name": t} if t in asked else t for t in titles]},
        inputs={"completions": completions.key},
        code_version=CODE_VERSION,
        work=work,
    )
    if made.reused:
        progress.start(f"judge {label}".strip())
        progress.finish(reused=True)
    return made


def check_judges(judges: Sequence[JudgeSpec], run: Run | None = None) -> None:
    """Find a mistake in the judges before any work.

    Args:
        judges: Names and specs.
        run: An endpoint that has judged in this run before is not asked if it is there: to look
            at finished results takes no server.

    Raises:
        SpecError: A judge is not registered.
        UserError: A judge's model or endpoint is not usable.
    """
    from qresafe.stages.judge_model import has_judged, model_judge

    for spec in judges:
        if isinstance(spec, str):
            registry.get(spec)
        else:
            model_judge(spec, check=run is None or not has_judged(run, spec))


def _ask_models(
    run: Run,
    completions: Artifact,
    judges: Sequence[JudgeSpec],
    runtime: Runtime,
    progress: Progress,
    label: str,
) -> dict[str, tuple[Artifact, dict[str, Any]]]:
    """Return title -> (answers, the judge's identity) of every model judge."""
    from qresafe.stages.judge_model import ask_judge

    models = [spec for spec in judges if not isinstance(spec, str)]
    return {
        spec.title: ask_judge(run, completions, spec, runtime, progress, label) for spec in models
    }


def verdict_on(function: Judge, row: Row) -> Verdict:
    """Return the judge's verdict on a completion row; an error row is undecided."""
    if row["error"]:
        return Verdict("undecided", f"generation failed: {row['error']}")
    return function(row["axis"], row["prompt"], row["completion"])


def count_outcomes(verdicts: Iterable[Row]) -> dict[str, dict[str, dict[str, int]]]:
    """Return judge -> axis -> outcome -> count."""
    counts: dict[str, dict[str, dict[str, int]]] = {}
    tally = collections.Counter((v["judge"], v["axis"], v["outcome"]) for v in verdicts)
    for (name, axis, outcome), count in tally.items():
        counts.setdefault(name, {}).setdefault(axis, {})[outcome] = count
    return counts


def _answered(title: str, answers: Artifact, progress: Progress) -> list[Row]:
    from qresafe.stages.judge_model import FILE as ANSWERS

    wanted = [name for name in VERDICT.names if name != "judge"]
    rows = read_table(answers.path / ANSWERS).select(wanted).to_pylist()
    progress.advance(len(rows))
    return [row | {"judge": title} for row in rows]


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
