"""What a person sees: plain lines in a log, bars on a terminal, tables with the text as it is."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from qresafe import console
from qresafe.console import (
    CLEAR_LINE,
    FollowedLog,
    LineProgress,
    LiveProgress,
    duration,
    progress_on,
    table,
)

CURSOR_BACK = "\x1b[?25h"


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console.time, "monotonic", clock)
    return clock


def test_a_log_hears_of_the_end_and_of_long_waits(clock: Clock) -> None:
    stream = io.StringIO()
    with progress_on(stream) as progress:
        progress.start("generate W", 240, "prompts")
        progress.advance(60, "300 tok/s")
        assert stream.getvalue() == ""
        clock.now = 16.0
        progress.advance(60, "310 tok/s")
        clock.now = 20.0
        progress.advance(120, "320 tok/s")
        progress.finish("2 errors")
    # From the first look, at 60 of 240: 60 more in 16 s are 3.75/s, and 120 / 3.75 = 32 s.
    assert stream.getvalue().splitlines() == [
        ". generate W  120/240 prompts  310 tok/s  32 s left",
        "+ generate W  240/240 prompts  2 errors  20 s",
    ]


def test_parts_nest_and_what_is_reused_says_so(clock: Clock) -> None:
    stream = io.StringIO()
    with progress_on(stream) as progress:
        progress.start("patch")
        progress.start("score [x]", 3)
        progress.advance(3)
        progress.finish()
        progress.finish()
        progress.start("judge")
        progress.finish(reused=True)
    assert stream.getvalue().splitlines() == [
        "+   score [x]  3/3  0.0 s",
        "+ patch  0.0 s",
        "= judge  reused",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_followed_log_keeps_its_progress_on_one_line() -> None:
    pieces = ["start\n. patch  3/", "30 steps  27 s left\n", ". patch  9/30 steps\n+ patch\nend"]
    file, terminal = io.StringIO(), Terminal()
    for stream in (file, terminal):
        log = FollowedLog(stream)
        for piece in pieces:
            log(piece)
        log.close()
    assert file.getvalue() == "".join(pieces)
    # A line that ends in no line break is replaced by what follows the next "clear".
    shown = [text.rpartition(CLEAR_LINE)[2] for text in terminal.getvalue().split("\n")]
    assert shown == ["start", "+ patch", "end"]
    assert f"{CLEAR_LINE}. patch  3/30 steps  27 s left{CLEAR_LINE}" in terminal.getvalue()


def test_stray_calls_do_no_harm() -> None:
    for make in (LineProgress, LiveProgress):
        progress = make(Console(file=io.StringIO()))
        progress.advance()
        progress.finish()


def test_a_terminal_gets_bars_that_leave_lines_behind() -> None:
    stream = io.StringIO()
    terminal = Console(file=stream, force_terminal=True, width=100)
    with LiveProgress(terminal) as progress:
        progress.start("generate W", 240, "prompts")
        progress.advance(240)
        progress.finish()
    assert "+ generate W  240/240 prompts" in stream.getvalue()
    assert CURSOR_BACK in stream.getvalue()


def test_a_terminal_is_tidy_after_an_error() -> None:
    stream = io.StringIO()
    terminal = Console(file=stream, force_terminal=True, width=100)
    live = LiveProgress(terminal)

    def interrupted() -> None:
        with live:
            live.start("generate W", 240, "prompts")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert stream.getvalue().rindex(CURSOR_BACK) > stream.getvalue().rindex("generate W")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.44, "0.4 s"),
        (12.4, "12 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_table_in_a_pipe_is_not_cut() -> None:
    stream = io.StringIO()
    table(["model", "share"], [["W", "0.8 [0.2, 3.0]"], ["x" * 120, "[bold]1"]], stream)
    header, first, second = stream.getvalue().splitlines()
    assert header.split() == ["model", "share"]
    assert first.split()[0] == "W"
    assert second.startswith("x" * 120)
    assert second.endswith("[bold]1")


def test_what_libraries_print_meanwhile_is_no_result(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_on():
        print("(raylet) WARNING: 4 PYTHON worker processes have been started")
    print("{}")
    out, err = capsys.readouterr()
    assert out == "{}\n"
    assert "(raylet) WARNING" in err
