"""How stages tell a person what they are doing, without knowing how it is shown."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

WINDOW = 64  # how many looks at a part its speed is computed from
LOOK_SECONDS = 1.0  # the least time between two of them


class Progress(Protocol):
    """Receives the state of the running stage; every call is cheap and may be ignored."""

    def start(self, stage: str, total: int | None = None, unit: str = "") -> None:
        """A stage (or part of one) begins; `total` units of work lie ahead, if known."""

    def advance(self, done: int = 1, note: str = "") -> None:
        """`done` more units are finished; `note` is a short live figure ("312 tok/s")."""

    def finish(self, note: str = "", reused: bool = False) -> None:
        """The running stage ended; `reused` says that an earlier run had made its result."""

    def beside(self) -> Progress:
        """Return a `Progress` for stages that run at the same time as those of this one."""


class Silent:
    """A `Progress` that shows nothing."""

    def start(self, stage: str, total: int | None = None, unit: str = "") -> None:
        pass

    def advance(self, done: int = 1, note: str = "") -> None:
        pass

    def finish(self, note: str = "", reused: bool = False) -> None:
        pass

    def beside(self) -> Progress:
        return self


class Both:
    """A `Progress` that hands everything on to two others."""

    def __init__(self, first: Progress, second: Progress) -> None:
        self._listeners = (first, second)

    def start(self, stage: str, total: int | None = None, unit: str = "") -> None:
        for each in self._listeners:
            each.start(stage, total, unit)

    def advance(self, done: int = 1, note: str = "") -> None:
        for each in self._listeners:
            each.advance(done, note)

    def finish(self, note: str = "", reused: bool = False) -> None:
        for each in self._listeners:
            each.finish(note, reused)

    def beside(self) -> Progress:
        first, second = self._listeners
        return Both(first.beside(), second.beside())


@dataclass
class Part:
    """A stage, or part of one, that has begun and not ended."""

    name: str
    total: int | None
    unit: str
    done: int = 0
    note: str = ""
    began: float = field(default_factory=lambda: time.monotonic())
    shown: float = field(default_factory=lambda: time.monotonic())  # when a log last heard of it
    moved: float = field(default_factory=lambda: time.monotonic())
    _looks: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def advance(self, done: int, note: str) -> None:
        """Count `done` more units."""
        self.done, self.note, self.moved = self.done + done, note or self.note, time.monotonic()
        if not self._looks or self.moved - self._looks[-1][0] >= LOOK_SECONDS:
            self._looks.append((self.moved, self.done))

    def count(self) -> str:
        of = f"/{self.total}" if self.total is not None else ""
        return f"{self.done}{of} {self.unit}".strip() if self.done or self.total else ""

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def rate(self) -> float | None:
        """Return the units per second of late, None before there is a second look.

        What was there at the first look does not count: it may have been found finished, and the
        time until then went into starting processes and loading models.
        """
        if not self._looks:
            return None
        began, before = self._looks[0]
        seconds = self.moved - began
        return (self.done - before) / seconds if seconds > 0 else None

    def seconds_left(self) -> float | None:
        """Return how long the rest takes at this speed, None if that is not known."""
        rate = self.rate()
        return (self.total - self.done) / rate if rate and self.total is not None else None


class Stack:
    """A `Progress` that knows the open parts, innermost last; subclasses show them."""

    def __init__(self) -> None:
        self._open: list[Part] = []
        self._lanes: list[Lane] = []

    def start(self, stage: str, total: int | None = None, unit: str = "") -> None:
        part = Part("  " * self._depth() + stage, total, unit)
        self._open.append(part)
        self._began(part)

    def advance(self, done: int = 1, note: str = "") -> None:
        if self._open:
            part = self._open[-1]
            part.advance(done, note)
            self._moved(part)

    def finish(self, note: str = "", reused: bool = False) -> None:
        if self._open:
            self._ended(self._open.pop(), note, reused)

    def beside(self) -> Progress:
        self._lanes.append(Lane(self))
        return self._lanes[-1]

    def parts(self) -> list[Part]:
        """Return all open parts, those of lanes after the one that they are in."""
        return [*self._open, *(part for lane in tuple(self._lanes) for part in lane.parts())]

    def path(self) -> str:
        """Return the names of the open parts: "outer > inner", "one and other" of lanes."""
        own = [part.name.strip() for part in tuple(self._open)]
        lanes = [path for lane in tuple(self._lanes) if (path := lane.path())]
        return " > ".join([*own, *([" and ".join(lanes)] if lanes else [])])

    def _depth(self) -> int:
        return len(self._open)

    def _began(self, part: Part) -> None:
        """Show that `part` has begun."""

    def _moved(self, part: Part) -> None:
        """Show how far `part` has come."""

    def _ended(self, part: Part, note: str, reused: bool) -> None:
        """Show that `part` has ended, and how."""


class Lane(Stack):
    """Open parts of what runs beside other things; shown where those are."""

    def __init__(self, around: Stack) -> None:
        super().__init__()
        self._around = around

    def _depth(self) -> int:
        return self._around._depth() + len(self._open)

    def _began(self, part: Part) -> None:
        self._around._began(part)

    def _moved(self, part: Part) -> None:
        self._around._moved(part)

    def _ended(self, part: Part, note: str, reused: bool) -> None:
        self._around._ended(part, note, reused)
