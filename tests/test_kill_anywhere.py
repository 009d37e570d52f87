"""A whole experiment whose process is killed again and again ends as one that was left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

# Killed as soon as this many stages have finished, so within the next one: what Q0 answers, and
# the patch.
FEW = (3, 8)
LONG = [pytest.mark.long, pytest.mark.timeout(1800)]  # every stage: fifteen starts
MINUTES = 4


def start(storage: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "qresafe.cli", "run", "cpu-smoke", "--workers", "0"]
    command += ["--set", "control=false"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([*command, "--storage", str(storage)], **quiet, env=environment())


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}  # equal bits need equal thread counts


def finished(storage: Path) -> int:
    return sum(1 for _ in storage.glob("runs/cpu-smoke/*/*/DONE"))


def killed_after(stages: int, storage: Path) -> None:
    process = start(storage)
    deadline = time.monotonic() + 60 * MINUTES
    while finished(storage) < stages and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()


def results(storage: Path) -> dict[str, bytes]:
    """Return what must not depend on kills: everything but times and what quotes them."""
    root = storage / "runs" / "cpu-smoke"
    timed = {"manifest.json", "history.jsonl", "DONE"}
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
        and path.name not in timed
        and "report" not in path.parts
        and not {"work", "logs"} & set(path.relative_to(root).parts)  # a log tells of every try
    }


@pytest.mark.ray  # not for Ray, but for its minutes
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [FEW, pytest.param(range(13), marks=LONG)])
def test_killed_in_any_stage_the_result_is_the_same(kills: Sequence[int], tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert start(undisturbed).wait(60 * MINUTES) == 0
    for stages in kills:
        killed_after(stages, killed)
    assert finished(killed) < finished(undisturbed)  # the last kill came before the end
    assert start(killed).wait(60 * MINUTES) == 0
    expected, found = results(undisturbed), results(killed)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert any(name.endswith("patch.qpatch") for name in expected)
