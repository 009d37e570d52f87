"""Completions of a generate stage as the answers that MT-Bench and AlpacaEval grade."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qresafe.artifacts import Run
from qresafe.errors import DataError
from qresafe.judges.mt_bench import Question
from qresafe.records import COMPLETION, require_columns
from qresafe.stages.alpaca import read_outputs
from qresafe.stages.generate import FILE
from qresafe.stages.imported import completions_of
from qresafe.stages.mt_bench import Answers, Turns, read_answers
from qresafe.stages.runtime import Row, read_table


def answers_at(run: Run, source: str, questions: Sequence[Question]) -> Answers:
    """Return answers to MT-Bench from FastChat's format or from completions of our own.

    Args:
        run: Where a foreign table's copy goes.
        source: A path or LABEL=PATH: FastChat's JSONL, a generate stage's folder, or Parquet.
        questions: Completions are told by their first turn's text; the others are ignored.

    Raises:
        DataError: The source is malformed, or a completion lacks the answer to the second turn.
    """
    label, path = _labelled(source)
    if not _is_table(path):
        return read_answers(path)
    known = {question.turns[0]: question for question in questions}
    turns: dict[int, Turns] = {}
    failed: dict[int, str] = {}
    for row in _rows(run, path):
        question = known.get(row["prompt"])
        if question is None:
            continue
        if row["error"]:
            failed[question.id] = row["error"]
        elif row["follow_ups"] != [question.turns[1]] or len(row["follow_up_answers"] or []) != 1:
            what = f"question {question.id} was asked without its second turn"
            remedy = "generate with question.jsonl as prompts, column turns"
            raise DataError(what, where=str(path), remedy=remedy)
        else:
            turns[question.id] = (row["completion"], row["follow_up_answers"][0])
    return Answers(label, turns, failed)


def outputs_at(run: Run, source: str) -> list[Row]:
    """Return outputs for AlpacaEval from its own format or from completions of our own.

    Args:
        run: Where a foreign table's copy goes.
        source: A path or LABEL=PATH: a JSON list, a generate stage's folder, or Parquet.

    Returns:
        Rows of instruction, output, generator; of a failed generation also `generation_error`.

    Raises:
        DataError: The source is malformed, or an instruction has two different outputs.
    """
    label, path = _labelled(source)
    if not _is_table(path):
        return read_outputs(path)
    found: dict[str, Row] = {}
    for row in _rows(run, path):
        made = {"instruction": row["prompt"], "output": row["completion"], "generator": label}
        if row["error"]:
            made |= {"output": "", "generation_error": row["error"]}
        if found.setdefault(row["prompt"], made) != made:
            what = f"two different outputs of {row['prompt'][:60]!r}"
            raise DataError(what, where=str(path), remedy="drop one of them")
    return list(found.values())


def _labelled(source: str) -> tuple[str, Path]:
    label, equals, path = source.partition("=")
    if equals and not Path(source).exists():
        return label, Path(path)
    whole = Path(source)
    return whole.resolve().parent.name if whole.name == FILE else whole.stem, whole


def _is_table(path: Path) -> bool:
    return path.is_dir() or path.suffix == ".parquet"


def _rows(run: Run, path: Path) -> list[Row]:
    """Return the first sample of every prompt."""
    if not path.exists():
        raise DataError("no such file", where=str(path), remedy="give a generate stage's folder")
    table = read_table(completions_of(run, path).path / FILE)
    rows: list[Row] = require_columns(table, COMPLETION, str(path)).to_pylist()
    return [row for row in rows if row["sample"] == 0]
