"""What a judge is: a function from one completion to a verdict."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from qresafe.records import Axis, Outcome


class Verdict(NamedTuple):
    """A judge's opinion of one completion.

    Attributes:
        outcome: What the completion does. *Undecided* is an answer of its own: nothing downstream
            counts it as safe or as unsafe.
        reason: The rule or phrase that decided, for a person who doubts the verdict.
    """

    outcome: Outcome
    reason: str


class Judge(Protocol):
    """Judges one completion; pure, and never raises on any string."""

    def __call__(self, axis: Axis, prompt: str, completion: str) -> Verdict:
        """Return the verdict on `completion`, an answer to `prompt` of a benchmark's `axis`."""


def straighten(text: str) -> str:
    """Return `text` with typographic apostrophes made straight, so that "can’t" is "can't"."""
    return text.replace("’", "'").replace("‘", "'").replace("`", "'")
