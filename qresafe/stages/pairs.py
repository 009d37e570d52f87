"""Stage: W's and Q0's answers to the calibration prompts become training rows (x, y_w, y_l)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from upath import UPath

from qresafe import records
from qresafe.artifacts import Artifact, Run
from qresafe.errors import DataError
from qresafe.hf.batching import length_plan
from qresafe.hf.chat import answer_ids, prompt_text, text_ids
from qresafe.hf.warm import ModelInput, shelf
from qresafe.progress import Progress
from qresafe.records import REFUSALS
from qresafe.registry import judges
from qresafe.specs import PairsSpec
from qresafe.stages.comparison import Contamination
from qresafe.stages.runtime import (
    Batch,
    BatchFunction,
    Row,
    Runtime,
    Spent,
    read_parts,
    read_table,
    write_table,
)

CODE_VERSION = 2
TEXTS_VERSION = 3  # of a teacher's texts: an answer that was cut does not end

TEACHER = pa.schema(
    [records.PAIR.field("prompt_id")]
    + [records.PAIR.field(name) for name in ("teacher_top_k", "teacher_ids", "teacher_logps")]
)


@dataclass(frozen=True)
class TeacherJob:
    """W's next-token distributions on the first tokens of its own answers.

    Args:
        teacher: W.
        tokens: How many tokens of each answer.
        top_k: Entries kept per token.
    """

    teacher: ModelInput
    tokens: int
    top_k: int

    def setup(self, device: str) -> BatchFunction:
        from qresafe.hf.generate import teacher_distribution

        model, _ = shelf().load(self.teacher, device)

        def score(rows: list[Row]) -> pa.Table:
            prompts, answers = [r["prompt_ids"] for r in rows], [r["chosen_ids"] for r in rows]
            with torch.no_grad():
                ids, logps = teacher_distribution(model, prompts, answers, self.tokens, self.top_k)
            columns = {
                "prompt_id": [row["prompt_id"] for row in rows],
                "teacher_top_k": [tensor.shape[1] for tensor in ids],
                "teacher_ids": [tensor.flatten().tolist() for tensor in ids],
                "teacher_logps": [tensor.flatten().tolist() for tensor in logps],
            }
            return pa.table(columns, schema=TEACHER)

        return score


def pairs(
    run: Run,
    *,
    teacher_completions: Artifact,
    q0_completions: Artifact,
    tokenizer: Any,
    teacher: ModelInput | None,
    spec: PairsSpec,
    runtime: Runtime,
    progress: Progress,
    contamination: Contamination | None = None,
) -> Artifact:
    """Make pairs.parquet (`records.PAIR`) of both models' answers to the same prompts.

    Args:
        run: Where the artefact goes.
        teacher_completions: W's answers to the calibration prompts (the generate stage).
        q0_completions: Q0's.
        tokenizer: The models' tokenizer, which renders the prompts.
        teacher: The model that gave the first answers, if it speaks in Q0's tokens; None where
            only its texts are of use (an endpoint, another tokenizer), which leaves no
            distributions for the `kl` term.
        spec: What is kept, and by which judge.
        runtime: Computes the teacher's distributions.
        progress: Advances by rows.
        contamination: What was dropped from the prompts before they were answered; noted.

    Raises:
        DataError: No row is usable.
    """

    def work(folder: UPath) -> Mapping[str, Any]:
        teacher_rows, q0_rows = _completions(teacher_completions), _completions(q0_completions)
        rows, counts = select(teacher_rows, q0_rows, spec, _judge(spec.judge))
        if contamination is not None:
            counts["contamination"] = contamination.model_dump()
        progress.start("pairs", len(rows), "rows")
        if teacher is None:
            rows = [row | {"chosen_ids": []} for row in rows]
        tokenize(rows, tokenizer)
        if teacher is not None and spec.teacher_tokens:
            parts = folder / "work" / "parts"
            spent = _add_distributions(rows, teacher, spec, runtime, parts, progress)
            counts["startup_seconds"] = spent.startup_seconds
        write_table(folder / "pairs.parquet", pa.Table.from_pylist(rows, records.PAIR))
        progress.finish(f"{counts['preferences']} preferences in {counts['rows']} rows")
        return counts

    inputs = {"completions": teacher_completions.key, "q0": q0_completions.key}
    made = run.stage(
        "pairs",
        # Where the prompts come from shows in the completions.
        spec=spec.key_data({"prompts", "near_duplicate"}) | _dropped(contamination),
        inputs=inputs | ({"teacher": teacher.key} if teacher else {}),
        code_version=CODE_VERSION if teacher else TEXTS_VERSION,
        work=work,
    )
    return made.shown(progress, "pairs")


def _dropped(contamination: Contamination | None) -> dict[str, Any]:
    if contamination is None or not contamination.exact + contamination.near:
        return {}  # so that pairs do not depend on what is evaluated
    return {"contamination": contamination.model_dump()}


def select(
    teacher: list[Row],
    q0: list[Row],
    spec: PairsSpec,
    refused: Callable[[Row], bool],
) -> tuple[list[Row], dict[str, Any]]:
    """Choose the rows to train on and count the others, by reason.

    A prompt of a kind in `prefer` becomes a preference if the answers differ and, where it is
    harmful and `keep` is flips, W refused and Q0 did not. The others carry W's answer as an anchor.

    Args:
        teacher: W's completions, as rows of `records.COMPLETION`.
        q0: Q0's completions of the same prompts.
        spec: What is kept.
        refused: Whether a completion is a refusal; asked for harmful prompts only.

    Returns:
        Rows in the teacher's order, and the counts for the manifest.

    Raises:
        DataError: No row is usable.
    """
    by_prompt = {row["prompt_id"]: row for row in q0 if row["sample"] == 0}
    dropped: Counter[str] = Counter()
    kept: list[Row] = []
    for chosen in teacher:
        rejected = by_prompt.get(chosen["prompt_id"])
        reason = _unusable(chosen, rejected, spec, refused)
        if reason is None:
            kept.append(_pair(chosen, rejected or chosen, spec))
        else:
            dropped[reason] += 1
    kept, surplus = _limit(kept, spec)
    if surplus:
        dropped["over max_preferences"] = surplus
    if not kept:
        remedy = "add calibration prompts, or take a Q0 that has lost refusals"
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
        raise DataError(
            f"W's and Q0's answers leave nothing to repair ({why or 'no prompts'})",
            where="pairs",
            remedy=remedy,
        )
    return kept, _counts(kept, dropped)


def tokenize(rows: list[Row], tokenizer: Any) -> None:
    """Add token ids to rows: the prompt's by the chat template, the answers' as generated.

    An endpoint's answers come without ids; where they were cut they have no end to be learned.
    """
    for row in rows:
        context = prompt_text(tokenizer, row["prompt"])
        row["prompt_ids"] = text_ids(tokenizer, context)
        for name in ("chosen", "rejected"):
            if not row[f"{name}_ids"]:
                ids = answer_ids(tokenizer, context, row[name])
                row[f"{name}_ids"] = ids[:-1] if row[f"{name}_finish"] == "length" else ids


def _unusable(
    chosen: Row, rejected: Row | None, spec: PairsSpec, refused: Callable[[Row], bool]
) -> str | None:
    if chosen["sample"] != 0:
        return "further samples"
    if rejected is None:
        return "not answered by Q0"
    if chosen["error"] or rejected["error"]:
        return "failed generations"
    if not chosen["completion"].strip():
        return "empty answers"
    if chosen["axis"] not in spec.prefer:
        return None
    if not rejected["completion"].strip():
        return "empty answers"
    if chosen["completion"] == rejected["completion"]:
        return "identical answers"
    if chosen["axis"] != "harmful" or spec.keep == "different":
        return None
    if not refused(chosen):
        return "W does not refuse"
    if refused(rejected):
        return "Q0 refuses too"
    return None


def _pair(chosen: Row, rejected: Row, spec: PairsSpec) -> Row:
    return {
        "prompt_id": chosen["prompt_id"],
        "kind": chosen["axis"],
        "prompt": chosen["prompt"],
        "chosen": chosen["completion"],
        "rejected": rejected["completion"],
        "preference": chosen["axis"] in spec.prefer,
        "chosen_ids": chosen["completion_ids"],
        "rejected_ids": rejected["completion_ids"],
        "chosen_finish": chosen["finish"],
        "rejected_finish": rejected["finish"],
    }


def _limit(rows: list[Row], spec: PairsSpec) -> tuple[list[Row], int]:
    places = [index for index, row in enumerate(rows) if row["preference"]]
    order = np.random.default_rng(spec.seed).permutation(places)
    surplus = {int(place) for place in order[spec.max_preferences :]}
    return [row for index, row in enumerate(rows) if index not in surplus], len(surplus)


def _counts(kept: list[Row], dropped: Mapping[str, int]) -> dict[str, Any]:
    preferences = sum(row["preference"] for row in kept)
    counts: dict[str, Any] = {
        "rows": len(kept),
        "preferences": preferences,
        "kinds": dict(sorted(Counter(row["kind"] for row in kept).items())),
        "dropped": dict(sorted(dropped.items())),
    }
    if not preferences:
        why = "Q0 refuses wherever W does, or answers alike"
        counts["warning"] = f"no preferences, for {why}: only anchors and kl rows are left"
    return counts


def _judge(name: str) -> Callable[[Row], bool]:
    judge = judges.get(name)

    def refused(row: Row) -> bool:
        return bool(judge("harmful", row["prompt"], row["completion"]).outcome in REFUSALS)

    return refused


def _completions(artifact: Artifact) -> list[Row]:
    path = artifact.path / "completions.parquet"
    rows: list[Row] = records.require_columns(
        read_table(path), records.COMPLETION, str(path)
    ).to_pylist()
    return rows


def _add_distributions(
    rows: list[Row],
    teacher: ModelInput,
    spec: PairsSpec,
    runtime: Runtime,
    parts: UPath,
    progress: Progress,
) -> Spent:
    needed = ("prompt_id", "prompt_ids", "chosen_ids")
    cut = [{name: row[name] for name in needed} for row in rows]
    for row in cut:  # what follows the first tokens is not looked at
        row["chosen_ids"] = row["chosen_ids"][: spec.teacher_tokens]
    plan = length_plan([len(r["prompt_ids"]) + len(r["chosen_ids"]) for r in cut], spec.batch_size)
    batches = [Batch(index, [cut[i] for i in places]) for index, places in enumerate(plan)]
    job = TeacherJob(teacher, spec.teacher_tokens, spec.teacher_top_k)
    spent = runtime.map_batches(job, batches, parts, progress)
    table = records.require_columns(read_parts(parts, len(batches)), TEACHER, str(parts))
    found = {row["prompt_id"]: row for row in table.to_pylist()}
    for row in rows:
        row |= found[row["prompt_id"]]
    return spent
