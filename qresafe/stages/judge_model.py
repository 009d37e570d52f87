"""The answers of one model judge on stored completions: a stage of its own, asked once.

Other judges of the same completions do not touch it, so that adding one never pays again.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
from upath import UPath

from qresafe.artifacts import Artifact, Run, read_manifest
from qresafe.hf.batching import length_plan
from qresafe.judge_specs import ClassifierSpec, EndpointSpec, ModelJudgeSpec
from qresafe.judges.base import Verdict
from qresafe.progress import Progress
from qresafe.records import COMPLETION, VERDICT, require_columns
from qresafe.stages.asking import cache_folder, usage, usage_note
from qresafe.stages.generate import FILE as COMPLETIONS
from qresafe.stages.judge_engines import ASKED, ModelJudge, local_judge
from qresafe.stages.judge_llm import LlmJudge, endpoint_judge
from qresafe.stages.runtime import Batch, Row, Runtime, read_parts, read_table, write_table

CODE_VERSION = 1
STAGE = "ask"
FILE = "answers.parquet"
# A verdict without its judge's name, which is the reader's choice, and what the model wrote.
ANSWERED = pa.schema(
    [field for field in VERDICT if field.name != "judge"]
    + [field for field in ASKED if field.name != "id"]
)
_NOT_ASKED: Row = {"answer": None, "prompt_tokens": 0, "new_tokens": 0, "cached": False}


def model_judge(spec: ModelJudgeSpec, *, check: bool = True) -> ModelJudge:
    """Return a spec's judge after checking all that can be checked before the work.

    Args:
        spec: A judge with settings.
        check: Whether an endpoint is asked if it is there; a local model is always looked at.

    Raises:
        UserError: The model, the endpoint or a setting is not usable.
    """
    if isinstance(spec, ClassifierSpec):
        return local_judge(spec)
    return endpoint_judge(spec, check=check)


def has_judged(run: Run, spec: ModelJudgeSpec) -> bool:
    """Return whether an endpoint has finished judging something in this run."""
    if isinstance(spec, ClassifierSpec):
        return False
    identity = model_judge(spec, check=False).identity
    finished = (run.root / STAGE).glob("*/DONE")
    return any(read_manifest(mark.parent).spec == identity for mark in finished)


def ask_judge(
    run: Run,
    completions: Artifact,
    spec: ModelJudgeSpec,
    runtime: Runtime,
    progress: Progress,
    label: str = "",
) -> tuple[Artifact, dict[str, Any]]:
    """Let one model judge look at every completion.

    Args:
        run: Where the result goes.
        completions: A finished `generate` stage.
        spec: The judge.
        runtime: Where to compute.
        progress: Told of every finished batch.
        label: What the model that answered is called in the display; not part of the key.

    Returns:
        The artefact with answers.parquet (`ANSWERED`), one row per completion in their order,
        and the judge's identity. What fails or is malformed is *undecided*, with the reason. The
        counts hold outcomes by axis, tokens, failures by kind and, of an endpoint, the cost.

    Raises:
        UserError: The model or endpoint is not usable.
    """
    judge = model_judge(spec, check=False)
    display = f"ask {spec.title} {label}".strip()

    def work(folder: UPath) -> Mapping[str, Any]:
        ready = _ready(model_judge(spec), run, runtime)
        table = require_columns(read_table(completions.path / COMPLETIONS), COMPLETION, COMPLETIONS)
        rows = [row | {"id": f"{row['prompt_id']}/{row['sample']}"} for row in table.to_pylist()]
        progress.start(display, len(rows), "verdicts")
        # What a part holds depends on this size, and the stage's key does not.
        parts = folder / "work" / f"parts-of-{ready.batch_size}"
        found = _ask(ready, rows, parts, runtime, progress)
        judged = [_judged(ready, row, found.get(row["id"])) for row in rows]
        write_table(folder / FILE, pa.Table.from_pylist(judged, schema=ANSWERED))
        prices = spec if isinstance(spec, EndpointSpec) else None
        counts = usage(found.values(), prices)
        progress.finish(usage_note(counts))
        return counts | {"outcomes": _outcomes(judged)}

    made = run.stage(
        STAGE,
        spec=judge.identity,
        inputs={"completions": completions.key},
        code_version=CODE_VERSION,
        work=work,
    )
    return made.shown(progress, display), judge.identity


def _ready(judge: ModelJudge, run: Run, runtime: Runtime) -> ModelJudge:
    """Tell an endpoint's judge where answers are kept and what share of the limits it has."""
    if not isinstance(judge, LlmJudge):
        return judge
    share = 1 / max(1, runtime.workers)
    return replace(judge, cache=cache_folder(run, judge.spec), share=share)


def _ask(
    judge: ModelJudge, rows: Sequence[Row], parts: UPath, runtime: Runtime, progress: Progress
) -> dict[str, Row]:
    """Return id -> row of `ASKED` of every completion that the model was, or should be, asked."""
    wanted = [row for row in rows if not row["error"] and not judge.not_for(row["axis"])]
    requests = judge.requests(wanted)
    found = {row["id"]: _NOT_ASKED | row for row in requests if row["error"]}
    sent = [row for row in requests if not row["error"]]
    progress.advance(len(rows) - len(sent))
    if not sent:
        return found
    groups = length_plan([row["size"] for row in sent], judge.batch_size)
    # The longest first, as in `generate`: memory is short at once or never.
    batches = [
        Batch(index, [sent[place] for place in group])
        for index, group in enumerate(reversed(groups))
    ]
    runtime.map_batches(judge, batches, parts, progress)
    answered = read_parts(parts, len(batches)).to_pylist()
    return found | {row["id"]: row for row in answered}


def _judged(judge: ModelJudge, row: Row, asked: Row | None) -> Row:
    kept = {name: row[name] for name in ("prompt_id", "sample", "axis")}
    said = asked or _NOT_ASKED | {"error": None}
    outcome, reason = _verdict(judge, row, said)
    extra = {name: said[name] for name in ASKED.names if name != "id"}
    return kept | {"outcome": outcome, "reason": reason} | extra


def _verdict(judge: ModelJudge, row: Row, said: Row) -> Verdict:
    if row["error"]:
        return Verdict("undecided", f"generation failed: {row['error']}")
    if excuse := judge.not_for(row["axis"]):
        return Verdict("undecided", excuse)
    if said["error"] or said["answer"] is None:
        return Verdict("undecided", f"judge failed: {said['error']}")
    return judge.verdict(row["axis"], said["answer"])


def _outcomes(judged: Sequence[Row]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for (axis, outcome), count in collections.Counter(
        (row["axis"], row["outcome"]) for row in judged
    ).items():
        counts.setdefault(axis, {})[outcome] = count
    return counts
