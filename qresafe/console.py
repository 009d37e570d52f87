"""What a person sees while stages run: live bars on a terminal, plain lines elsewhere.

Everything goes to stderr, so that stdout holds the result alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from qresafe.progress import Progress

PLAIN_INTERVAL = 15.0  # seconds between two lines of one stage in a log


@dataclass
class _Part:
    """A stage, or part of one, that has begun and not ended."""

    name: str
    total: int | None
    unit: str
    done: int = 0
    note: str = ""
    began: float = field(default_factory=lambda: time.monotonic())
    shown: float = field(default_factory=lambda: time.monotonic())  # when a log last heard of it

    def count(self) -> str:
        of = f"/{self.total}" if self.total is not None else ""
        return f"{self.done}{of} {self.unit}".strip() if self.done or self.total else ""

    def seconds(self) -> float:
        return time.monotonic() - self.began


@contextmanager
def progress_on(stream: IO[str] | None = None) -> Iterator[Progress]:
    """Give a `Progress` that suits `stream` (default stderr), and leave the screen tidy.

    Args:
        stream: A terminal gets live bars; a file, pipe or job log gets plain lines.
    """
    console = Console(file=stream or sys.stderr, highlight=False)
    if not console.is_terminal:
        yield LineProgress(console)
        return
    with LiveProgress(console) as live:
        yield live


class _Stack:
    """The open parts, innermost last; subclasses show what happens to them."""

    def __init__(self) -> None:
        self._open: list[_Part] = []

    def start(self, stage: str, total: int | None = None, unit: str = "") -> None:
        part = _Part("  " * len(self._open) + stage, total, unit)
        self._open.append(part)
        self._began(part)

    def advance(self, done: int = 1, note: str = "") -> None:
        if self._open:
            part = self._open[-1]
            part.done, part.note = part.done + done, note or part.note
            self._moved(part)

    def finish(self, note: str = "", reused: bool = False) -> None:
        if self._open:
            part = self._open.pop()
            self._ended(part, _ending(part, note, reused), reused)

    def _began(self, part: _Part) -> None:
        """Show that `part` has begun."""

    def _moved(self, part: _Part) -> None:
        """Show how far `part` has come."""

    def _ended(self, part: _Part, line: str, reused: bool) -> None:
        """Show that `part` has ended, and how."""


class LineProgress(_Stack):
    """A line when a part ends, and one every quarter of a minute while it lasts."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def _moved(self, part: _Part) -> None:
        if time.monotonic() - part.shown >= PLAIN_INTERVAL:
            part.shown = time.monotonic()
            self._say(f". {_joined(part.name, part.count(), part.note)}")

    def _ended(self, part: _Part, line: str, reused: bool) -> None:
        self._say(line)

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)


class LiveProgress(_Stack):
    """One bar for each open part; a part that ends leaves a line above the bars."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}  {task.fields[note]}", style="dim", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
        )
        self._tasks: dict[int, TaskID] = {}  # id(part) -> its bar

    def __enter__(self) -> LiveProgress:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def _began(self, part: _Part) -> None:
        bar = self._bars.add_task(part.name, total=part.total, count=part.count(), note="")
        self._tasks[id(part)] = bar

    def _moved(self, part: _Part) -> None:
        bar = self._tasks[id(part)]
        self._bars.update(bar, completed=part.done, count=part.count(), note=part.note)

    def _ended(self, part: _Part, line: str, reused: bool) -> None:
        self._bars.remove_task(self._tasks.pop(id(part)))
        style = "dim" if reused else ""
        self._bars.console.print(Text(line, style=style), soft_wrap=True)


def _ending(part: _Part, note: str, reused: bool) -> str:
    if reused:
        return f"= {_joined(part.name, note, 'reused')}"
    return f"+ {_joined(part.name, part.count(), note or part.note, duration(part.seconds()))}"


def _joined(*words: str) -> str:
    return "  ".join(word for word in words if word)


def duration(seconds: float) -> str:
    """Return "0.4 s", "12 s", "3 min 20 s" or "2 h 5 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    stream: IO[str] | None = None,
    *,
    words: bool = False,
) -> None:
    """Print a table: the first column to the left, figures to the right.

    Args:
        header: One name for each column.
        rows: Cells as text, as many as `header` has.
        stream: Where to print; default stdout.
        words: The other columns hold words: to the left too.
    """
    grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for position, name in enumerate(header):
        first = position == 0
        side: Literal["left", "right"] = "left" if first or words else "right"
        grid.add_column(name, justify=side, no_wrap=first, overflow="fold")
    for row in rows:
        grid.add_row(*(Text(str(cell)) for cell in row))
    console = Console(file=stream or sys.stdout, highlight=False)
    if not console.is_terminal:  # a pipe has no width: let lines be as long as they are
        console = Console(file=stream or sys.stdout, highlight=False, width=1000)
    console.print(grid)
