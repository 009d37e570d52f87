"""One driver at a time on a run: refused in words, given back by whatever ends the first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from upath import UPath

from qresafe import driver_lock
from qresafe.cli import main
from qresafe.driver_lock import RECORD, Driver, driver_of, sole_driver
from qresafe.errors import ResourceError
from qresafe.leftovers import process_began

HOLD = """
import sys, time
from upath import UPath
from qresafe.driver_lock import sole_driver
with sole_driver(UPath(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def bucket() -> UPath:
    root = UPath(f"memory://lock-{os.getpid()}-{time.monotonic_ns()}/runs/a")
    root.mkdir(parents=True)
    return root


def holder(root: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(root)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_driver_is_refused_and_a_killed_ones_run_is_free(tmp_path: Path) -> None:
    root = UPath(tmp_path / "runs" / "a")
    first = holder(tmp_path / "runs" / "a")
    told = rf"a driver already \(process {first.pid} on .+ UTC\) in .+: wait .+ another --name"
    with pytest.raises(ResourceError, match=told), sole_driver(root):
        pass
    found = driver_of(root)
    assert found
    assert found.process == first.pid
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (root / RECORD).exists()  # nobody took it away
    assert driver_of(root) is None
    with sole_driver(root):
        assert str(driver_of(root)).startswith(f"process {os.getpid()} on ")
    assert driver_of(root) is None
    with sole_driver(UPath(tmp_path / "runs" / "b")), sole_driver(root):
        pass  # another run is no matter of this lock


def test_the_command_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--storage", str(tmp_path), "--name", "a"]
    with sole_driver(UPath(tmp_path / "runs" / "a")), pytest.raises(SystemExit) as leaving:
        main(["run", "cpu-smoke", *options, "--workers", "0"])
    said = capsys.readouterr().err
    assert leaving.value.code == 2
    assert "error: this run has a driver already" in said
    assert "Traceback" not in said
    assert not (tmp_path / "runs" / "a" / "quantize").exists()


def test_an_object_store_keeps_a_record(bucket: UPath) -> None:
    with sole_driver(bucket):
        with pytest.raises(ResourceError, match=f"process {os.getpid()} on"), sole_driver(bucket):
            pass
        assert driver_of(bucket)
    assert not (bucket / RECORD).exists()


def test_a_record_is_taken_over_when_its_driver_is_gone(
    bucket: UPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_lock, "WATCH_SECONDS", 0.2)
    here, now = Driver.here(), time.time()
    elsewhere = here.model_copy(update={"host": "another-host"})
    reused = here.model_copy(update={"began": here.began - 5.0})  # its number is ours now
    silent = elsewhere.model_copy(update={"seen": now - driver_lock.STALE_SECONDS - 1})
    for driver, gone in ((here, False), (reused, True), (silent, True)):
        assert (driver.gone() or driver.silent()) is gone
        (bucket / RECORD).write_text(driver.model_dump_json())
        if gone:
            with sole_driver(bucket):
                pass
            continue
        with pytest.raises(ResourceError, match=driver.host), sole_driver(bucket):
            pass


def test_a_retry_waits_until_the_record_of_a_lost_host_is_silent(
    bucket: UPath, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(driver_lock, "WATCH_SECONDS", 0.1)
    monkeypatch.setattr(driver_lock, "STALE_SECONDS", 1.0)
    lost = Driver.here().model_copy(update={"host": "lost"})
    (bucket / RECORD).write_text(lost.model_dump_json())
    with sole_driver(bucket):
        assert time.time() > lost.seen + 1.0
    assert "watching whether that is still there" in caplog.text


@pytest.mark.parametrize("ends", [False, True])
def test_what_another_host_does_meanwhile_decides_at_once(
    bucket: UPath, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    monkeypatch.setattr(driver_lock, "WATCH_SECONDS", 0.1)
    there = Driver.here().model_copy(update={"host": "another-host"})
    (bucket / RECORD).write_text(there.model_dump_json())
    later = there.model_copy(update={"seen": time.time(), "renewed": 1}).model_dump_json()
    does = (bucket / RECORD).unlink if ends else lambda: (bucket / RECORD).write_text(later)
    meanwhile = threading.Timer(0.3, does)
    meanwhile.start()
    refused = pytest.raises(ResourceError, match="another-host")
    with nullcontext() if ends else refused, sole_driver(bucket):
        pass
    assert time.time() < there.seen + 60  # and not after STALE_SECONDS
    meanwhile.join()


def test_a_record_is_renewed(bucket: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_lock, "RENEW_SECONDS", 0.02)
    with sole_driver(bucket):
        first, deadline = driver_of(bucket), time.monotonic() + 10
        while driver_of(bucket) == first and time.monotonic() < deadline:
            time.sleep(0.02)
        renewed = driver_of(bucket)
        assert first
        assert renewed
        assert renewed.seen > first.seen
        assert renewed.since == first.since


@pytest.mark.parametrize("jump", [-86400.0, 86400.0])
def test_a_clock_that_jumps_gives_no_run_away(
    bucket: UPath, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    monkeypatch.setattr(driver_lock, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(driver_lock, "WATCH_SECONDS", 2.0)
    real = time.time
    with sole_driver(bucket):
        # The newcomer's clock is a day off, so that the record looks a day old, or of tomorrow.
        monkeypatch.setattr(Driver, "silent", lambda self: abs(real() + jump - self.seen) > 600)
        with pytest.raises(ResourceError, match="a driver already"), sole_driver(bucket):
            pass
        monkeypatch.setattr(time, "time", lambda: real() + jump)  # and now its own jumps
        assert driver_of(bucket) is not None
    assert not (bucket / RECORD).exists()


def test_a_record_of_a_dead_host_whose_clock_was_ahead_is_taken_over(
    bucket: UPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_lock, "WATCH_SECONDS", 0.2)
    ahead = {"host": "another-host", "seen": time.time() + 86400}
    (bucket / RECORD).write_text(Driver.here().model_copy(update=ahead).model_dump_json())
    with sole_driver(bucket):
        assert str(driver_of(bucket)).startswith(f"process {os.getpid()} on ")


def test_when_a_process_began_is_not_told_by_the_clock() -> None:
    """In seconds since the host began: /proc/uptime minus the age that ps counts."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    now = float(Path("/proc/uptime").read_text().split()[0])
    began = process_began(process.pid)
    assert began
    assert now - 30 < began <= now + 0.1
    assert process_began(process.pid) == began
    process.kill()
    process.wait()
    assert process_began(process.pid) is None


def test_a_storage_that_refuses_its_record_is_one_sentence(
    bucket: UPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("unable to locate credentials")

    monkeypatch.setattr(type(bucket.fs), "_open", refuse)
    with pytest.raises(ResourceError, match=r"cannot be used .+ credentials"), sole_driver(bucket):
        pass


def test_half_a_record_is_no_driver(bucket: UPath) -> None:
    (bucket / RECORD).write_text('{"host": "x"')
    with sole_driver(bucket):
        pass
