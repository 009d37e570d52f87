"""MT-Bench (Zheng et al. 2023): what a judge is asked about two-turn answers, and how it is read.

The prompts are FastChat's, word for word. Two readings are stricter than FastChat's, so that what
is malformed is undecided: a rating must lie between 1 and 10, and a judgment that holds two
different marks has no winner (FastChat takes the first of A, B, C).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from qresafe.judges.templates import fill, read_data

NEEDS_REFERENCE = ("math", "reasoning", "coding")
TURNS = (1, 2)

Mark = Literal["A", "B", "tie"]
Winner = Literal["model_1", "model_2", "tie"]
_RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")
_RATING_BACKUP = re.compile(r"\[(\d+(?:\.\d+)?)\]")
_MARK = re.compile(r"\[\[([ABC])\]\]")


@dataclass(frozen=True)
class Question:
    """One of MT-Bench's questions.

    Attributes:
        id: The question's id.
        category: One of eight; three of them need reference answers.
        turns: The user's two messages.
        reference: The reference answers to both; None where the category needs none.
    """

    id: int
    category: str
    turns: tuple[str, str]
    reference: tuple[str, str] | None


class JudgePrompt(BaseModel):
    """A prompt of FastChat's judge."""

    model_config = ConfigDict(frozen=True)

    system_prompt: str
    prompt_template: str


@functools.cache
def prompts() -> dict[str, JudgePrompt]:
    """Return name -> prompt of all that FastChat's judge uses."""
    data = read_data("mt_bench")["prompts"]
    return {name: JudgePrompt.model_validate(entry) for name, entry in data.items()}


def prompt_name(answers: int, question: Question, turn: int) -> str:
    """Return the name of the prompt for grading one answer, or for comparing two."""
    kind = "single" if answers == 1 else "pair"
    version = "math-v1" if question.reference else {"single": "v1", "pair": "v2"}[kind]
    return f"{kind}-{version}{'-multi-turn' if turn == 2 else ''}"


def messages(
    question: Question, turn: int, answers: Sequence[tuple[str, str]]
) -> list[dict[str, str]]:
    """Return what the judge is asked.

    Args:
        question: The question.
        turn: 1, or 2: both turns are shown and the second is judged.
        answers: Both turns of one model's answer, or of two models' in the order to show.
    """
    prompt = prompts()[prompt_name(len(answers), question, turn)]
    texts = {f"question_{place}": text for place, text in zip(TURNS, question.turns, strict=True)}
    texts["question"] = question.turns[0]
    names = ("answer",) if len(answers) == 1 else ("answer_a", "answer_b")
    for name, (first, second) in zip(names, answers, strict=True):
        texts |= {name: first, f"{name}_1": first, f"{name}_2": second}
    if question.reference:
        texts |= {"ref_answer_1": question.reference[0], "ref_answer_2": question.reference[1]}
    return [
        {"role": "system", "content": prompt.system_prompt},
        {"role": "user", "content": fill(prompt.prompt_template, texts)},
    ]


def rating(judgment: str) -> float | None:
    """Return the first [[rating]], or else the first [rating]; None if it is none of 1 to 10."""
    found = _RATING.search(judgment) or _RATING_BACKUP.search(judgment)
    value = float(found.group(1)) if found else 0.0
    return value if 1 <= value <= 10 else None


def mark(judgment: str) -> Mark | None:
    """Return who is better; None if no mark, or different ones, occur."""
    found = set(_MARK.findall(judgment))
    if len(found) != 1:
        return None
    marks: dict[str, Mark] = {"A": "A", "B": "B", "C": "tie"}
    return marks[found.pop()]


def agreed(first: Mark | None, swapped: Mark | None) -> Winner | None:
    """Return who wins both games, the second with swapped places; disagreement is a tie.

    Args:
        first: The mark where model 1 is A.
        swapped: The mark where model 1 is B.

    Returns:
        None if one of the games is undecided.
    """
    if first is None or swapped is None:
        return None
    if (first, swapped) == ("A", "B"):
        return "model_1"
    if (first, swapped) == ("B", "A"):
        return "model_2"
    return "tie"


def as_fastchat(said: Mark | None, *, swapped: bool) -> str:
    """Return a game's winner as FastChat writes it: model_1, model_2, tie or error."""
    if said is None or said == "tie":
        return said or "error"
    return "model_1" if (said == "A") != swapped else "model_2"


def mean(values: Sequence[float]) -> float | None:
    """Return the mean; None of no values."""
    return sum(values) / len(values) if values else None


def grading_summary(scores: Sequence[tuple[Question, int, float | None]]) -> dict[str, Any]:
    """Return FastChat's three averages, and those by category.

    Args:
        scores: Question, turn and rating; an undecided rating is left out, as FastChat's -1 is.

    Returns:
        first_turn, second_turn and average in [1, 10] (None without ratings), by_category,
        and how many ratings are decided and undecided.
    """
    decided = [(question, turn, score) for question, turn, score in scores if score is not None]
    categories = dict.fromkeys(question.category for question, _, _ in scores)
    return {
        "first_turn": mean([score for _, turn, score in decided if turn == 1]),
        "second_turn": mean([score for _, turn, score in decided if turn == 2]),
        "average": mean([score for _, _, score in decided]),
        "by_category": {
            name: mean([score for question, _, score in decided if question.category == name])
            for name in categories
        },
        "decided": len(decided),
        "undecided": len(scores) - len(decided),
    }


def pair_summary(winners: Sequence[Winner | None]) -> dict[str, Any]:
    """Return model 1's wins, losses and ties, and its rates; a tie counts half in `adjusted`."""
    decided = [winner for winner in winners if winner is not None]
    win, loss = decided.count("model_1"), decided.count("model_2")
    n, tie = len(decided), decided.count("tie")
    return {
        "win": win,
        "loss": loss,
        "tie": tie,
        "undecided": len(winners) - n,
        "win_rate": win / n if n else None,
        "loss_rate": loss / n if n else None,
        "win_rate_adjusted": (win + 0.5 * tie) / n if n else None,
    }
