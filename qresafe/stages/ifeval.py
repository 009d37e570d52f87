"""IFEval's four accuracies of completions: strict and loose, by prompt and by instruction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from qresafe.errors import DataError
from qresafe.hf.tables import read_table
from qresafe.stages.comparison import Share
from qresafe.stages.instructions import CHECKS, follows, follows_loosely
from qresafe.stages.runtime import Row
from qresafe.stages.statistics import wilson

Instructions = list[tuple[str, Mapping[str, Any]]]


class IfevalResult(BaseModel):
    """How far completions follow their prompts' instructions.

    Attributes:
        prompt_strict: Prompts all of whose instructions are followed.
        instruction_strict: Instructions that are followed.
        prompt_loose: The same after a first or last line or asterisks are left out.
        instruction_loose: Likewise.
        not_scored: Instruction -> prompts left out because there is no check of it here.
        failed: Prompts whose generation failed, which are left out.
    """

    model_config = ConfigDict(frozen=True)

    prompt_strict: Share
    instruction_strict: Share
    prompt_loose: Share
    instruction_loose: Share
    not_scored: dict[str, int]
    failed: int


def read_instructions(path: str) -> dict[str, Instructions]:
    """Return prompt -> its instructions and their arguments, from IFEval's own table.

    Raises:
        DataError: The table cannot be read or lacks a column.
    """
    table = read_table(path, "train")
    needed = ("prompt", "instruction_id_list", "kwargs")
    if missing := [name for name in needed if name not in table.column_names]:
        remedy = "give IFEval's input_data.jsonl or a copy of google/IFEval"
        raise DataError(f"no column {missing[0]!r}", where=path, remedy=remedy)
    return {
        row["prompt"]: list(zip(row["instruction_id_list"], row["kwargs"], strict=True))
        for row in table.select(needed).to_pylist()
    }


def score(completions: Iterable[Row], wanted: Mapping[str, Instructions]) -> IfevalResult:
    """Score completions of IFEval's prompts.

    Args:
        completions: Rows with prompt, completion and error; other prompts are skipped.
        wanted: From `read_instructions`.

    Raises:
        DataError: None of the prompts is IFEval's.
    """
    rows = [row for row in completions if row["prompt"] in wanted]
    if not rows:
        remedy = "generate with evaluate.prompts=[{benchmark: ifeval}]"
        raise DataError("no completion is of a prompt of IFEval", remedy=remedy)
    answered = [row for row in rows if not row["error"]]
    unknown = [_unknown(wanted[row["prompt"]]) for row in answered]
    scored = [row for row, names in zip(answered, unknown, strict=True) if not names]
    strict, loose = (
        [[check(i, r["completion"], a) for i, a in wanted[r["prompt"]]] for r in scored]
        for check in (follows, follows_loosely)
    )
    return IfevalResult(
        prompt_strict=_share([all(found) for found in strict]),
        instruction_strict=_share([one for found in strict for one in found]),
        prompt_loose=_share([all(found) for found in loose]),
        instruction_loose=_share([one for found in loose for one in found]),
        not_scored=dict(sorted(Counter(name for names in unknown for name in names).items())),
        failed=len(rows) - len(answered),
    )


def _unknown(instructions: Instructions) -> set[str]:
    return {name for name, _ in instructions} - CHECKS.keys()


def _share(found: Sequence[bool]) -> Share:
    low, high = wilson(sum(found), len(found))
    share = sum(found) / len(found) if found else None
    return Share(yes=sum(found), n=len(found), share=share, low=low, high=high)
