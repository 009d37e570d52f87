"""Two tasks at the same time, without Ray: order, display, and what a failure does."""

from __future__ import annotations

import io
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from upath import UPath

from qresafe.console import LineProgress
from qresafe.driving import driving
from qresafe.failure import read_failure
from qresafe.progress import Progress, Silent
from qresafe.progress_file import ProgressFile
from qresafe.specs import ResourcesSpec
from qresafe.stages.pools import at_once


def progress_of(progress: Any) -> str:
    """Return the open stages that `driving`'s progress file would tell of."""
    return str(progress._listeners[1].stage())


POOLS: Any = ("the teacher's", "Q0's")


def meeting(both: threading.Barrier, pool: Any, progress: Progress) -> Any:
    """A task that ends only if the other one runs too; its result is its pool."""
    progress.start(f"generate in {pool}", 2, "completions")
    both.wait(timeout=30)
    progress.advance(2)
    progress.finish()
    return pool


def test_tasks_meet_and_results_keep_their_order() -> None:
    both = threading.Barrier(2)
    made: Any = at_once([partial(meeting, both)] * 2, POOLS, Silent())
    assert tuple(made) == POOLS


def test_each_has_its_own_line() -> None:
    out = io.StringIO()
    progress = LineProgress(Console(file=out, width=120))
    progress.start("reproduce", 3, "rows")
    at_once([partial(meeting, threading.Barrier(2))] * 2, POOLS, progress)
    progress.advance(1)
    progress.finish()
    *lanes, outer = out.getvalue().splitlines()
    expected = [f"+   generate in {pool}  2/2 completions" for pool in POOLS]
    assert sorted(line.rpartition("  ")[0] for line in lanes) == sorted(expected)
    assert outer.startswith("+ reproduce  1/3 rows")


def test_the_file_tells_of_both(tmp_path: Path) -> None:
    file = ProgressFile(UPath(tmp_path))
    file.start("reproduce")
    lanes = [file.beside() for _ in POOLS]
    for lane, name in zip(lanes, ("generate W", "generate Q0"), strict=True):
        lane.start(name, 4)
    lanes[1].start("part")
    lanes[0].advance(3)
    assert file.stage() == "reproduce > generate W and generate Q0 > part"
    told = [(one.stage, one.done) for one in file.now().stages]
    assert told == [("reproduce", 0), ("generate W", 3), ("generate Q0", 0), ("part", 0)]


def test_a_failure_stops_the_other_and_is_told_of_where_it_arose(tmp_path: Path) -> None:
    done: list[int] = []
    failed = threading.Event()

    def fail(pool: Any, progress: Progress) -> Any:
        progress.start("generate W")
        failed.set()
        raise OSError("the pool is dry")

    def go_on(pool: Any, progress: Progress) -> Any:
        progress.start("generate Q0", 10**6)
        assert failed.wait(30)
        for batch in range(10**6):
            done.append(batch)
            progress.advance(1)

    root = UPath(tmp_path / "runs" / "a")
    with (
        pytest.raises(OSError, match="the pool is dry"),
        driving(root, Silent()) as progress,
    ):
        at_once([fail, go_on], POOLS, progress)
    assert len(done) < 10**6
    told = read_failure(root)
    assert told is not None
    assert told.stage == "generate W"  # the other one was closed


def interrupted(thread: threading.Thread, timeout: float | None = None) -> None:
    raise SystemExit(15)


def test_an_interrupt_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, ended = threading.Event(), threading.Event()

    def wait(pool: Any, progress: Progress) -> Any:
        held.wait(30)
        try:
            progress.start("after")
        finally:
            ended.set()

    root = UPath(tmp_path / "runs" / "a")
    with driving(root, Silent()) as progress:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "join", interrupted)
            with pytest.raises(SystemExit):
                at_once([wait, wait], POOLS, progress)
        told = read_failure(root)
        assert told is not None  # at once: Ray may abort the process before `driving` ends
        assert told.kind == "stopped"
        held.set()
        assert ended.wait(30)
        assert progress_of(progress) == ""  # `start` raised


def test_some_workers_are_left_for_q0() -> None:
    assert ResourcesSpec(workers=3, teacher_workers=2).teacher_workers == 2
    for workers in (0, 1, 2):
        with pytest.raises(ValueError, match="less than workers"):
            ResourcesSpec(workers=workers, teacher_workers=2)
