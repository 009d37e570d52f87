"""New calibration prompts from a user's own: the start of one kind, the end of another.

A patch that has seen harmful and harmless prompts alone draws its boundary anywhere between them.
Prompts that cross the two, answered by W itself, show where W draws it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import islice

from qresafe.errors import DataError
from qresafe.stages.contamination import normalise

# Whose start is joined to whose end. The words of a harmful request in a harmless frame, and the
# reverse; a borderline prompt lends its innocent end.
CROSSINGS = (("harmful", "benign"), ("harmful", "borderline"), ("benign", "harmful"))
TRIES = 200  # pairs of prompts looked at for each prompt wanted, before it is given up


def recombine(texts: Mapping[str, Sequence[str]], count: int, seed: int = 0) -> list[str]:
    """Cross prompts of different kinds at a word that both hold (one-point crossover).

    "Explain how to pick a lock" and "How do I bake a cake?" both hold "a": "Explain how to pick a
    cake?". Nothing is known of grammar, so it works for any language that puts spaces between
    words; nobody labels what comes out.

    Args:
        texts: Kind -> its prompts; harmful and benign ones, and borderline ones where there are.
        count: How many to make, in equal parts of `CROSSINGS`.
        seed: Of the choice.

    Returns:
        Prompts that differ from one another and from all of `texts`, normalised.

    Raises:
        DataError: A kind is missing, or the prompts share too few words for so many.
    """
    for kind in ("harmful", "benign"):
        if not texts.get(kind):
            raise DataError(f"there are no {kind} prompts to cross", remedy="add some to the pool")
    rng = random.Random(f"recombine {seed}")
    groups = [(a, b) for a, b in CROSSINGS if texts.get(a) and texts.get(b)]
    seen = {normalise(text) for prompts in texts.values() for text in prompts}
    made: list[str] = []
    for place, (start, end) in enumerate(groups):
        wanted = count // len(groups) + (place < count % len(groups))
        fresh = _unseen(_crossed(texts[start], texts[end], rng, TRIES * wanted), seen)
        made += islice(fresh, wanted)
    if len(made) < count:
        what = f"only {len(made)} of {count} recombined prompts could be made"
        raise DataError(what, remedy=f"ask for {len(made)}, or give more prompts of each kind")
    return made


def by_kind(rows: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Return kind -> its prompts, of rows (kind, prompt)."""
    texts: dict[str, list[str]] = {}
    for kind, prompt in rows:
        texts.setdefault(kind, []).append(prompt)
    return texts


def cross(start: str, end: str, of_start: Set[str], of_end: Set[str]) -> str | None:
    """Return the start of one prompt and the end of another, joined at a word of both.

    Args:
        start: Begins the new prompt.
        end: Ends it.
        of_start: Words that tell the first's kind: no prompt of the second's kind holds them.
        of_end: The reverse. The new prompt holds at least one of each, or it would be a prompt
            of one kind in other words.

    Returns:
        The crossing nearest to the middle of both, or None.
    """
    before, after = start.split(), end.split()
    here, there = _plain(before), _plain(after)
    first = next((i for i, word in enumerate(here) if word in of_start), len(here))
    last = max((j for j, word in enumerate(there) if word in of_end), default=-1)
    joints = [
        (abs(i + 1 - len(here) / 2) / len(here) + abs(j + 1 - len(there) / 2) / len(there), i, j)
        for i in range(first + 1, len(here) - 1)
        for j in range(1, last)
        if here[i] == there[j]
    ]
    if not joints:
        return None
    _, i, j = min(joints)
    return " ".join([*before[: i + 1], *after[j + 1 :]])


def _crossed(
    starts: Sequence[str], ends: Sequence[str], rng: random.Random, tries: int
) -> Iterator[str]:
    of_start, of_end = _words(starts) - _words(ends), _words(ends) - _words(starts)
    for _ in range(tries):
        made = cross(rng.choice(starts), rng.choice(ends), of_start, of_end)
        if made is not None:
            yield made


def _unseen(texts: Iterator[str], seen: set[str]) -> Iterator[str]:
    for text in texts:
        if normalise(text) not in seen:
            seen.add(normalise(text))
            yield text


def _words(texts: Sequence[str]) -> set[str]:
    return {word for text in texts for word in _plain(text.split())}


def _plain(words: Sequence[str]) -> list[str]:
    return [normalise(word) for word in words]
