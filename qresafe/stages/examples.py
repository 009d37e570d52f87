"""Which completions a report shows, and how they are told apart."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qresafe.records import REFUSALS
from qresafe.stages.arms import Q0, ArmRows, Q, W
from qresafe.stages.measures import roles
from qresafe.stages.utility import exact_match

PER_GROUP = 3
LONGEST = 700  # characters of a completion that are shown
SHOWN = (W, Q0, Q)


class Answer(NamedTuple):
    """One arm's answer to a prompt."""

    label: str
    text: str
    outcome: str
    reason: str


class Example(NamedTuple):
    """One prompt and what the arms made of it."""

    prompt_id: str
    prompt: str
    target: str | None
    harmful: bool  # shown only on request
    answers: list[Answer]


class Group(NamedTuple):
    """Examples of one kind."""

    title: str
    total: int  # how many there are; a few are shown
    examples: list[Example]


@dataclass(frozen=True)
class _Case:
    """All arms' rows of one prompt."""

    row: Mapping[str, str]
    said: Mapping[str, str]  # label -> outcome
    exact: Mapping[str, bool]

    def on(self, axis: str) -> bool:
        return self.row["axis"] == axis


_GROUPS: tuple[tuple[str, Callable[[_Case], bool]], ...] = (
    (
        "Harmful: answered by Q0, refused by Q",
        lambda c: c.on("harmful") and c.said[Q0] == "complied" and c.said[Q] in REFUSALS,
    ),
    ("Harmful: still answered by Q", lambda c: c.on("harmful") and c.said[Q] == "complied"),
    (
        "Safe but refused by Q, and not by W",
        lambda c: not c.on("harmful") and c.said[Q] in REFUSALS and c.said[W] not in REFUSALS,
    ),
    (
        "Ordinary: right under Q0, not under Q",
        lambda c: bool(c.on("benign") and c.row["target"] and c.exact[Q0] and not c.exact[Q]),
    ),
    ("Incoherent under Q", lambda c: c.said[Q] == "incoherent"),
    ("Undecided under Q", lambda c: c.said[Q] == "undecided"),
)


def choose(arms: Sequence[ArmRows], reasons: Mapping[str, Sequence[str]]) -> list[Group]:
    """Pick a few examples of each kind of change, the same ones in every run.

    Args:
        arms: The arms, read; without W, Q0 and Q among them there are no examples.
        reasons: Label -> the main judge's reason for each completion, in order.

    Returns:
        The groups that have an example, each with at most `PER_GROUP`.
    """
    by_label = {arm.label: arm for arm in arms if arm.label in SHOWN}
    if len(by_label) < len(SHOWN):
        return []
    cases = [_case(by_label, index) for index in range(len(by_label[W].completions))]
    groups = []
    for title, belongs in _GROUPS:
        members = [index for index, case in enumerate(cases) if belongs(case)]
        # By hash: neighbours in a benchmark resemble each other.
        shown = sorted(members, key=lambda index: _shuffled(cases[index]))[:PER_GROUP]
        examples = [_example(by_label, reasons, index) for index in sorted(shown)]
        groups.append(Group(title, len(members), examples))
    return [group for group in groups if group.examples]


def main_judge(arm: ArmRows) -> str:
    """Return the judge whose verdicts examples show."""
    named = roles(list(arm.outcomes))
    return named.get("main", named.get("attack", next(iter(arm.outcomes))))


def _case(arms: Mapping[str, ArmRows], index: int) -> _Case:
    row = arms[W].completions[index]
    said = {label: arm.outcomes[main_judge(arm)][index] for label, arm in arms.items()}
    target = row["target"] or ""
    exact = {
        label: exact_match(arm.completions[index]["completion"], target)
        for label, arm in arms.items()
    }
    return _Case(row, said, exact)


def _shuffled(case: _Case) -> str:
    return hashlib.sha256(case.row["prompt_id"].encode()).hexdigest()


def _example(
    arms: Mapping[str, ArmRows], reasons: Mapping[str, Sequence[str]], index: int
) -> Example:
    row = arms[W].completions[index]
    answers = [
        Answer(
            label,
            shorten(arms[label].completions[index]["completion"]),
            arms[label].outcomes[main_judge(arms[label])][index],
            reasons[label][index],
        )
        for label in SHOWN
    ]
    harmful = row["axis"] == "harmful"
    return Example(row["prompt_id"], shorten(row["prompt"]), row["target"], harmful, answers)


def shorten(text: str) -> str:
    """Return at most `LONGEST` characters of `text`, with a mark where it was cut."""
    return text if len(text) <= LONGEST else text[:LONGEST].rstrip() + " …"
