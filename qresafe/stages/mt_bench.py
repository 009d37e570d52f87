"""Stage: MT-Bench's answers, graded by an endpoint, alone or against another model's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upath import UPath

from qresafe.artifacts import Artifact, Run, content_key, write_text
from qresafe.errors import DataError
from qresafe.jsonl import read_jsonl
from qresafe.judge_specs import EndpointSpec
from qresafe.judges import mt_bench as rules
from qresafe.judges.mt_bench import NEEDS_REFERENCE, TURNS, Question
from qresafe.progress import Progress
from qresafe.stages.asking import AskJob, ask_all, cache_folder, usage, usage_note
from qresafe.stages.runtime import Row, Runtime

CODE_VERSION = 1
FILE = "judgments.jsonl"
RESULT = "mt_bench.json"

Turns = tuple[str, str]


@dataclass(frozen=True)
class Answers:
    """One model's answers: question id -> both turns."""

    model: str
    turns: Mapping[int, Turns]


@dataclass(frozen=True)
class Game:
    """One thing to ask the judge: a question, a turn, and the answers in the order shown."""

    question: Question
    turn: int
    answers: tuple[Turns, ...]
    swapped: bool = False

    @property
    def id(self) -> str:
        return f"{self.question.id}/{self.turn}{'/swapped' if self.swapped else ''}"

    @property
    def row(self) -> Row:
        return {"id": self.id, "messages": rules.messages(self.question, self.turn, self.answers)}


def mt_bench(
    run: Run,
    questions: Sequence[Question],
    answers: Answers,
    against: Answers | None,
    spec: EndpointSpec,
    runtime: Runtime,
    progress: Progress,
) -> Artifact:
    """Grade answers from 1 to 10, or compare them with another model's in both orders.

    Args:
        run: Where the result goes.
        questions: The questions, with references where their categories need them.
        answers: The answers to judge; all questions must be answered.
        against: Another model's answers; None: single grading.
        spec: The judge.
        runtime: Where to ask.
        progress: Told of every finished batch.

    Returns:
        The artefact with judgments.jsonl (FastChat's format, with `error` where the judge failed)
        and mt_bench.json, the summary.

    Raises:
        DataError: A question is not answered.
        ModelError: The key is refused.
    """
    sides = [answers] if against is None else [answers, against]
    for side in sides:
        _require_all(questions, side)
    games = [
        game for question in questions for turn in TURNS for game in _games(question, turn, sides)
    ]

    def work(folder: UPath) -> Mapping[str, Any]:
        progress.start("mt-bench", len(games), "judgments")
        job = AskJob(spec, cache_folder(run, spec), share=1 / max(1, runtime.workers))
        asked = [game.row for game in games]
        said = ask_all(job, asked, folder / "work" / "parts", runtime, progress)
        name = spec.model
        if against is None:
            lines, result = _graded(games, said, answers, name)
        else:
            lines, result = _compared(games, said, (answers, against), name)
        counts = usage(said, spec)
        write_text(folder / FILE, "".join(json.dumps(line) + "\n" for line in lines))
        write_text(folder / RESULT, json.dumps(result | {"usage": counts}, indent=1))
        progress.finish(usage_note(counts))
        return counts | {"result": result}

    return run.stage(
        "mt_bench",
        spec=spec.model_dump(mode="json", exclude=set(spec.PATIENCE)),
        inputs={
            "games": content_key([game.row for game in games]),
            "models": content_key([side.model for side in sides]),
        },
        code_version=CODE_VERSION,
        work=work,
    )


def read_questions(path: Path, references: Path | None) -> list[Question]:
    """Read FastChat's question.jsonl, and reference answers in its answer format.

    Raises:
        DataError: A line is malformed, an id repeats, or a needed reference is missing.
    """
    known = read_answers(references).turns if references else {}
    found: dict[int, Question] = {}
    for number, line in read_jsonl(path):
        where = f"{path}, line {number}"
        try:
            identifier, category = int(line["question_id"]), str(line["category"])
            turns = _two(line["turns"])
        except (KeyError, TypeError, ValueError):
            remedy = "give question_id, category and two turns, as FastChat's question.jsonl"
            raise DataError("not a question of MT-Bench", where=where, remedy=remedy) from None
        reference = known.get(identifier) if category in NEEDS_REFERENCE else None
        if category in NEEDS_REFERENCE and reference is None:
            remedy = "give reference answers to all of " + ", ".join(NEEDS_REFERENCE)
            raise DataError(f"question {identifier} has no reference", where=where, remedy=remedy)
        if identifier in found:
            raise DataError(f"question {identifier} occurs twice", where=where, remedy="drop one")
        found[identifier] = Question(identifier, category, turns, reference)
    if not found:
        raise DataError("no question", where=str(path), remedy="give at least one")
    return list(found.values())


def read_answers(path: Path) -> Answers:
    """Read answers in FastChat's format: question_id, model_id, choices[0].turns.

    Raises:
        DataError: A line is malformed, or the file is empty.
    """
    turns: dict[int, Turns] = {}
    model = path.stem
    for number, line in read_jsonl(path):
        try:
            turns[int(line["question_id"])] = _two(line["choices"][0]["turns"])
            model = str(line.get("model_id", model))
        except (KeyError, TypeError, ValueError, IndexError):
            remedy = "give question_id and choices[0].turns with two texts, as FastChat does"
            where = f"{path}, line {number}"
            raise DataError("not an answer to MT-Bench", where=where, remedy=remedy) from None
    if not turns:
        raise DataError("no answer", where=str(path), remedy="give at least one")
    return Answers(model, turns)


def _two(texts: Any) -> Turns:
    first, second = texts
    if not (isinstance(first, str) and isinstance(second, str)):
        raise TypeError
    return first, second


def _require_all(questions: Sequence[Question], answers: Answers) -> None:
    missing = [question.id for question in questions if question.id not in answers.turns]
    if missing:
        what = f"{len(missing)} questions are not answered, {missing[0]} first"
        raise DataError(what, where=answers.model, remedy="answer all, or drop the questions")


def _games(question: Question, turn: int, sides: Sequence[Answers]) -> list[Game]:
    shown = tuple(side.turns[question.id] for side in sides)
    if len(shown) == 1:
        return [Game(question, turn, shown)]
    return [Game(question, turn, shown), Game(question, turn, shown[::-1], swapped=True)]


def _graded(
    games: Sequence[Game], said: Sequence[Row], answers: Answers, judge: str
) -> tuple[list[Row], Row]:
    lines, scores = [], []
    for game, reply in zip(games, said, strict=True):
        score = rules.rating(reply["answer"] or "")
        scores.append((game.question, game.turn, score))
        lines.append(
            {
                "question_id": game.question.id,
                "model": answers.model,
                "judge": [judge, rules.prompt_name(1, game.question, game.turn)],
                "user_prompt": game.row["messages"][1]["content"],
                "judgment": reply["answer"],
                "score": -1 if score is None else score,
                "turn": game.turn,
                "error": reply["error"],
            }
        )
    return lines, {"model": answers.model, "judge": judge} | rules.grading_summary(scores)


def _compared(
    games: Sequence[Game], said: Sequence[Row], sides: tuple[Answers, Answers], judge: str
) -> tuple[list[Row], Row]:
    lines, winners = [], []
    pairs = zip(games[::2], said[::2], said[1::2], strict=True)
    for game, first, second in pairs:
        marks = [rules.mark(reply["answer"] or "") for reply in (first, second)]
        winners.append(rules.agreed(*marks))
        lines.append(
            {
                "question_id": game.question.id,
                "model_1": sides[0].model,
                "model_2": sides[1].model,
                "g1_winner": rules.as_fastchat(marks[0], swapped=False),
                "g2_winner": rules.as_fastchat(marks[1], swapped=True),
                "judge": [judge, rules.prompt_name(2, game.question, game.turn)],
                "g1_judgment": first["answer"],
                "g2_judgment": second["answer"],
                "turn": game.turn,
                "error": first["error"] or second["error"],
            }
        )
    named = {"model_1": sides[0].model, "model_2": sides[1].model, "judge": judge}
    return lines, named | rules.pair_summary(winners)
