"""What a person sees while stages run: live bars on a terminal, plain lines elsewhere.

Everything goes to stderr, so that stdout holds the result alone.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
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

from qresafe.progress import Part, Progress, Stack

PLAIN_INTERVAL = 15.0  # seconds between two lines of one stage in a log
RUNNING = ". "  # what such a line begins with
CLEAR_LINE = "\r\x1b[2K"


@contextmanager
def progress_on(stream: IO[str] | None = None) -> Iterator[Progress]:
    """Give a `Progress` that suits `stream` (default stderr), and leave the screen tidy.

    Meanwhile what is printed goes to stderr: stdout is for results, which programs read, and Ray
    prints warnings of its nodes there.

    Args:
        stream: A terminal gets live bars; a file, pipe or job log gets plain lines.
    """
    console = Console(file=stream or sys.stderr, highlight=False)
    with redirect_stdout(sys.stderr):
        if not console.is_terminal:
            yield LineProgress(console)
            return
        with LiveProgress(console) as live:
            yield live


class LineProgress(Stack):
    """A line when a part ends, and one every quarter of a minute while it lasts."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def _moved(self, part: Part) -> None:
        if time.monotonic() - part.shown >= PLAIN_INTERVAL:
            part.shown = time.monotonic()
            left = part.seconds_left()
            rest = f"{duration(left)} left" if left else ""
            self._say(f"{RUNNING}{_joined(part.name, part.count(), part.note, rest)}")

    def _ended(self, part: Part, note: str, reused: bool) -> None:
        self._say(_ending(part, note, reused))

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)


class FollowedLog:
    """The log of a job elsewhere, piece by piece; on a terminal, its progress stays on one line.

    Args:
        out: Where to write; default stdout. What is no terminal gets the log as it is.
    """

    def __init__(self, out: IO[str] | None = None) -> None:
        self._out = out or sys.stdout
        self._live, self._rest = self._out.isatty(), ""

    def __call__(self, text: str) -> None:
        """Show the next piece, which may end within a line."""
        if not self._live:
            self._write(text)
            return
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            running = line.startswith(RUNNING)
            shown = line[: shutil.get_terminal_size().columns - 1] if running else f"{line}\n"
            self._write(CLEAR_LINE + shown)

    def close(self) -> None:
        """Show what is left, and leave the screen tidy."""
        if self._live:
            self._write(CLEAR_LINE + self._rest)

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


class LiveProgress(Stack):
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

    def _began(self, part: Part) -> None:
        bar = self._bars.add_task(part.name, total=part.total, count=part.count(), note="")
        self._tasks[id(part)] = bar

    def _moved(self, part: Part) -> None:
        bar = self._tasks[id(part)]
        self._bars.update(bar, completed=part.done, count=part.count(), note=part.note)

    def _ended(self, part: Part, note: str, reused: bool) -> None:
        self._bars.remove_task(self._tasks.pop(id(part)))
        line = Text(_ending(part, note, reused), style="dim" if reused else "")
        self._bars.console.print(line, soft_wrap=True)


def _ending(part: Part, note: str, reused: bool) -> str:
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
