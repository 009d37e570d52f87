"""Which completions a report shows, and how they are told apart."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from qresafe.artifacts import Artifact
from qresafe.errors import DataError
from qresafe.records import COMPLETION, REFUSALS, VERDICT
from qresafe.stages.arms import Q0, Q, W
from qresafe.stages.generate import FILE as COMPLETIONS
from qresafe.stages.judge import FILE as VERDICTS
from qresafe.stages.judge import titles_in
from qresafe.stages.measures import roles
from qresafe.stages.streams import read_rows
from qresafe.stages.utility import exact_match

PER_GROUP = 3
LONGEST = 700  # characters of a completion that are shown
SHOWN = (W, Q0, Q)
READ = pa.schema(
    COMPLETION.field(name) for name in ("prompt_id", "axis", "prompt", "target", "completion")
)
SAID = pa.schema(VERDICT.field(name) for name in ("prompt_id", "judge", "outcome", "reason"))


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


class Told(NamedTuple):
    """One arm's completion and what the main judge said of it."""

    row: Mapping[str, Any]
    outcome: str
    reason: str


@dataclass(frozen=True)
class _Case:
    """All arms' rows of one prompt."""

    row: Mapping[str, Any]
    said: Mapping[str, str]  # label -> outcome
    exact: Mapping[str, bool]
    told: Mapping[str, Told]

    def on(self, axis: str) -> bool:
        return bool(self.row["axis"] == axis)


_GROUPS: tuple[tuple[str, Callable[[_Case], bool]], ...] = (
    (
        "Harmful: refused by W, answered by Q0",
        lambda c: c.on("harmful") and c.said[W] in REFUSALS and c.said[Q0] == "complied",
    ),
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
        "Safe and refused by W, answered by Q",
        lambda c: not c.on("harmful") and c.said[W] in REFUSALS and c.said[Q] == "complied",
    ),
    (
        "Ordinary: right under Q0, not under Q",
        lambda c: bool(c.on("benign") and c.row["target"] and c.exact[Q0] and not c.exact[Q]),
    ),
    ("Incoherent under Q", lambda c: c.said[Q] == "incoherent"),
    ("Undecided under Q", lambda c: c.said[Q] == "undecided"),
)


def choose(pieces: Iterable[Sequence[Mapping[str, Told]]]) -> list[Group]:
    """Pick a few examples of each kind of change, the same ones in every run.

    Args:
        pieces: Pieces of an arms' stream (`told`): for each prompt, label -> what is told of it.

    Returns:
        The groups that have an example, each with at most `PER_GROUP`.
    """
    totals = [0] * len(_GROUPS)
    # By hash: neighbours in a benchmark resemble each other.
    kept: list[list[tuple[str, int, _Case]]] = [[] for _ in _GROUPS]
    for place, told_of in enumerate(case for piece in pieces for case in piece):
        case = _case(told_of)
        for group, (title, belongs) in enumerate(_GROUPS):
            if belongs(case):
                totals[group] += 1
                kept[group] = sorted([*kept[group], (_shuffled(case, title), place, case)])[
                    :PER_GROUP
                ]
    return [
        Group(title, total, [_example(case) for _, _, case in sorted(few, key=lambda k: k[1])])
        for (title, _), total, few in zip(_GROUPS, totals, kept, strict=True)
        if few
    ]


def told(arms: Mapping[str, tuple[Artifact, Artifact]]) -> Iterator[list[dict[str, Told]]]:
    """Read W, Q0 and Q side by side; nothing where one of them is missing.

    Raises:
        DataError: The arms or their verdicts are in different orders.
    """
    if not set(SHOWN) <= set(arms):
        return
    streams = [_told_of(label, *arms[label]) for label in SHOWN]
    for parts in zip(*streams, strict=True):
        sides = list(zip(*parts, strict=True))
        if any(len({told.row["prompt_id"] for told in side}) > 1 for side in sides):
            raise DataError("W, Q0 and Q are in different orders", remedy="generate them again")
        yield [dict(zip(SHOWN, side, strict=True)) for side in sides]


def main_judge(judges: Sequence[str]) -> str:
    """Return the judge whose verdicts examples show."""
    named = roles(judges)
    return named.get("main", named.get("attack", judges[0]))


def _told_of(label: str, completions: Artifact, verdicts: Artifact) -> Iterator[list[Told]]:
    judge = main_judge(titles_in(verdicts))
    said = (
        row
        for rows in read_rows(verdicts.path / VERDICTS, SAID)
        for row in rows
        if row["judge"] == judge
    )
    for rows in read_rows(completions.path / COMPLETIONS, READ):
        judged = list(itertools.islice(said, len(rows)))
        if [v["prompt_id"] for v in judged] != [row["prompt_id"] for row in rows]:
            raise DataError("verdicts in another order", where=label, remedy="judge again")
        yield [Told(row, v["outcome"], v["reason"]) for row, v in zip(rows, judged, strict=True)]


def _case(told_of: Mapping[str, Told]) -> _Case:
    row = told_of[W].row
    exact = {
        label: bool(row["target"]) and exact_match(told.row["completion"], row["target"])
        for label, told in told_of.items()
    }
    return _Case(row, {label: told.outcome for label, told in told_of.items()}, exact, told_of)


def _shuffled(case: _Case, title: str) -> str:
    return hashlib.sha256(f"{title} {case.row['prompt_id']}".encode()).hexdigest()


def _example(case: _Case) -> Example:
    row = case.row
    answers = [
        Answer(label, shorten(told.row["completion"]), told.outcome, told.reason)
        for label, told in case.told.items()
    ]
    harmful = row["axis"] == "harmful"
    return Example(row["prompt_id"], shorten(row["prompt"]), row["target"], harmful, answers)


def shorten(text: str) -> str:
    """Return at most `LONGEST` characters of `text`, with a mark where it was cut."""
    return text if len(text) <= LONGEST else text[:LONGEST].rstrip() + " …"
