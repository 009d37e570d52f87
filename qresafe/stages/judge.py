"""Verdicts on stored completions: judging again never generates again."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
from upath import UPath

from qresafe.artifacts import Artifact, Run
from qresafe.errors import DataError
from qresafe.judge_specs import JudgeSpec, title_of
from qresafe.judges.base import Judge, Verdict
from qresafe.progress import Progress
from qresafe.records import COMPLETION, VERDICT
from qresafe.registry import judges as registry
from qresafe.stages.generate import FILE as COMPLETIONS
from qresafe.stages.runtime import InProcessRuntime, Row, Runtime
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
        source = completions.path / COMPLETIONS
        progress.start(f"judge {label}".strip(), count_rows(source) * len(titles), "verdicts")
        tally: Tally = collections.Counter()
        with table_writer(folder / FILE, VERDICT) as writer:
            for title in titles:
                said = (
                    _answered(title, asked[title][0], progress)
                    if title in asked
                    else _ruled(title, rules[title], source, progress)
                )
                for made in said:
                    tally.update((v["judge"], v["axis"], v["outcome"]) for v in made)
                    writer.write(made)
        progress.finish()
        return count_outcomes(tally)

    made = run.stage(
        "judge",
        # A model judge is named by what its answers depend on: other weights are another judge.
        spec={"judges": [asked[t][1] | {"name": t} if t in asked else t for t in titles]},
        inputs={"completions": completions.key},
        code_version=CODE_VERSION,
        work=work,
    )
    return made.shown(progress, f"judge {label}".strip())


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


def count_outcomes(tally: Tally) -> dict[str, dict[str, dict[str, int]]]:
    """Return judge -> axis -> outcome -> count."""
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for (name, axis, outcome), count in tally.items():
        counts.setdefault(name, {}).setdefault(axis, {})[outcome] = count
    return counts


def titles_in(verdicts: Artifact) -> list[str]:
    """Return the judges of a finished judge stage, by the names that verdicts.parquet has."""
    told = verdicts.manifest.spec["judges"]
    return [judge if isinstance(judge, str) else judge["name"] for judge in told]


def _answered(title: str, answers: Artifact, progress: Progress) -> Iterator[list[Row]]:
    from qresafe.stages.judge_model import FILE as ANSWERS

    wanted = pa.schema(field for field in VERDICT if field.name != "judge")
    for rows in read_rows(answers.path / ANSWERS, wanted):
        progress.advance(len(rows))
        yield [row | {"judge": title} for row in rows]


def _ruled(title: str, function: Judge, source: UPath, progress: Progress) -> Iterator[list[Row]]:
    for rows in read_rows(source, READ):
        yield _verdicts(title, function, rows, progress)


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
