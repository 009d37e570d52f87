"""progress.json: what other terminals read while a run goes on, and after its driver was killed."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from pathlib import Path

import pytest
from upath import UPath

from qresafe import progress
from qresafe.commands.runs import now
from qresafe.driver_lock import sole_driver
from qresafe.progress import Both, Part, Silent
from qresafe.progress_file import FILE, ProgressFile, RunProgress, StageProgress, read_progress
from qresafe.stages.runs import find_runs
from tests.test_runs_command import run


def test_speed_counts_from_the_first_look(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    part = Part("generate W", 100, "completions")
    assert part.rate() is None
    clock[0] = 30.0  # processes started, a model loaded, and 40 were found finished
    part.advance(40, "found finished")
    assert part.seconds_left() is None
    for clock[0] in (31.0, 32.0, 35.0):
        part.advance(5, "")
    # 15 more in 5 s are 3/s; 100 - 55 = 45 left, 45 / 3 = 15 s
    assert (part.done, part.rate(), part.seconds_left()) == (55, 3.0, 15.0)


def test_speed_is_that_of_the_last_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    part = Part("patch", None, "steps")
    for clock[0] in range(200):
        part.advance(1 if clock[0] < 100 else 2, "")
    assert part.rate() == 2.0  # the window of 64 s has forgotten the slow ones
    assert part.seconds_left() is None  # no total


def wait_for(root: UPath, note: str) -> None:
    deadline = time.monotonic() + 20
    while not (told := read_progress(root)) or note not in [stage.note for stage in told.stages]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_file_tells_of_open_stages_and_goes(tmp_path: Path) -> None:
    root = UPath(tmp_path / "runs" / "a")
    with sole_driver(root), ProgressFile(root, seconds=0.05) as file:
        both = Both(Silent(), file)
        both.start("reproduce", 3, "rows")
        both.start("patch", 30, "steps")
        both.advance(6, "loss 0.5")
        wait_for(root, note="loss 0.5")
        (found,) = find_runs(str(tmp_path))
        assert found.state == "running"
        assert found.progress is not None
        assert (found.progress.process, file.stage()) == (os.getpid(), "reproduce > patch")
        outer, inner = found.progress.stages
        assert (outer.stage, inner.stage) == ("reproduce", "patch")
        assert (inner.done, inner.total, inner.unit, inner.note) == (6, 30, "steps", "loss 0.5")
        assert abs(inner.began - time.time()) < 60
    assert not (tmp_path / "runs" / "a" / FILE).exists()
    assert read_progress(root) is None


def test_a_line_for_people() -> None:
    stage = StageProgress(
        stage="generate Q0",
        done=40,
        total=128,
        unit="completions",
        rate=3.2,
        seconds_left=27.5,
        note="312 tok/s",
        began=0.0,
        moved=1.0,
    )
    told = RunProgress(host="h", process=1, updated=0.0, stages=[stage])
    assert now(told) == ["generate Q0  40/128 completions  3.2/s  312 tok/s  28 s left"]


def test_what_a_killed_driver_leaves_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs" / "a"
    root.mkdir(parents=True)
    file = ProgressFile(UPath(root))
    file.start("patch", 30, "steps")
    file.advance(6)
    (root / FILE).write_text(file.now().model_dump_json())  # and nobody holds the run
    (found,) = find_runs(str(tmp_path))
    assert found.state == "killed"
    assert run("show", "a", "--storage", str(tmp_path)) == 0
    assert "ended without a word" in capsys.readouterr().out


def test_a_storage_that_fails_holds_nobody_up(tmp_path: Path) -> None:
    root = UPath(tmp_path / "nowhere" / "a")  # not there: every write fails
    with ProgressFile(root, seconds=0.01) as file:
        file.start("judge")
        time.sleep(0.05)
        file.finish()


def test_what_a_killed_driver_was_writing_is_swept(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    half = tmp_path / f"progress.json.tmp-{ended.pid}-1-{socket.gethostname()}"
    living = tmp_path / f"progress.json.tmp-{os.getpid()}-1-{socket.gethostname()}"
    half.touch(), living.touch()
    with ProgressFile(UPath(tmp_path)):
        pass
    assert not half.exists()
    assert living.exists()
