"""The table of docs/reliability/hostile.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

PAGE = Path("docs/reliability/hostile.md")
HEAD = """# Hostile inputs

Made by `make bench-hostile`. Every case must end in a result or in one sentence that says what is
wrong. A defect is anything else: another exception, a message of several lines, more than
{seconds:.0f} s of processor time, more than {room} GiB of memory beyond what the program takes
anyway. Cases are made by seeds (`bench/hostile_inputs.py`), so that the same command makes the same
ones; a slice of them is a unit test (`tests/bench/test_hostile.py`). "Accepted" are cases that are
still sound after the damage, or whose odd values are allowed.

| input | given to | cases | accepted | refused | defects | slowest, CPU s |
|---|---|---:|---:|---:|---:|---:|
"""


class Row(NamedTuple):
    """One kind of input: what it is, what it was given to, and how its cases ended."""

    name: str
    fed: str
    cases: int
    accepted: int
    refused: int
    slowest: float

    @property
    def figures(self) -> tuple[int, ...]:
        """Cases, accepted, refused, and the rest: defects."""
        rest = self.cases - self.accepted - self.refused
        return (self.cases, self.accepted, self.refused, rest)


def write_page(rows: Sequence[Row], seconds: float, room: int) -> None:
    """Write the page.

    Args:
        rows: One per kind.
        seconds: The limit of a case.
        room: The bytes that a case may take.
    """
    lines = [
        f"| {row.name} | `{row.fed}` | {_shown(row.figures)} | {row.slowest:.2f} |" for row in rows
    ]
    sums = tuple(sum(column) for column in zip(*(row.figures for row in rows), strict=True))
    slowest = max(row.slowest for row in rows)
    lines.append(f"| all | | {_shown(sums)} | {slowest:.2f} |")
    head = HEAD.format(seconds=seconds, room=room >> 30)
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(head + "\n".join(lines) + "\n")


def _shown(figures: Sequence[int]) -> str:
    return " | ".join(f"{figure:,}" for figure in figures)
