"""A whole experiment whose process is killed again and again ends as one that was left alone."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

# Killed as soon as this many stages have finished, so within the next one: what Q0 answers, and
# the patch.
FEW = (3, 8)
LONG = [pytest.mark.long, pytest.mark.timeout(1800)]  # every stage: fifteen starts
MINUTES = 4
# Each start is a process of its own, forked from one that has done the imports: ten seconds less.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["qresafe.cli", "qresafe.stages.experiment", "qresafe.dist.runtime"])


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # equal bits need equal thread counts


def start(storage: Path) -> BaseProcess:
    process = FORKED.Process(target=experiment, args=(storage,))
    process.start()
    return process


def experiment(storage: Path) -> None:
    """Be the command `qresafe run`."""
    from qresafe.cli import main

    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    main(
        ["run", "cpu-smoke", "--workers", "0", "--set", "control=false", "--storage", str(storage)]
    )


def ended(process: BaseProcess) -> bool:
    """Wait for a process and say whether it did all that it should."""
    process.join(60 * MINUTES)
    process.kill()  # one that hangs: else pytest would wait for it at its own end
    return process.exitcode == 0


def finished(storage: Path) -> int:
    return sum(1 for _ in storage.glob("runs/cpu-smoke/*/*/DONE"))


def killed_after(stages: int, storage: Path) -> None:
    process = start(storage)
    deadline = time.monotonic() + 60 * MINUTES
    while finished(storage) < stages and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    process.kill()
    process.join()


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
    assert ended(start(undisturbed))
    for stages in kills:
        killed_after(stages, killed)
    assert finished(killed) < finished(undisturbed)  # the last kill came before the end
    assert ended(start(killed))
    expected, found = results(undisturbed), results(killed)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert any(name.endswith("patch.qpatch") for name in expected)
