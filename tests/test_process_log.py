"""Logs per rank: bounded, without secrets, found through `error.json`, and never in the way."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest
from upath import UPath

from qresafe import process_log
from qresafe.driving import driving
from qresafe.failure import read_failure
from qresafe.process_log import end_log, log, log_path, logged
from qresafe.progress import Silent
from qresafe.stages.runtime import Batch, BatchFunction, InProcessRuntime, Row


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    forget()


def forget() -> None:
    """Be as a process that has just started."""
    end_log()
    log.handlers.clear()


@dataclass(frozen=True)
class FailsAt:
    """Gives three tokens a row, but fails at a batch."""

    batch: int

    def setup(self, device: str) -> BatchFunction:
        def compute(rows: list[Row]) -> pa.Table:
            if rows[0]["id"] == f"r{self.batch}":
                raise RuntimeError("hf_" + "a1" * 12 + " is not a number")
            return pa.table({"new_tokens": [3 for _ in rows]})

        return compute


def run(root: Path, batches: int, fails_at: int) -> None:
    todo = [Batch(i, [{"id": f"r{i}"}]) for i in range(batches)]
    parts = UPath(root / "generate" / "key" / "work" / "parts")
    with driving(UPath(root), Silent()) as progress:
        InProcessRuntime().map_batches(FailsAt(fails_at), todo, parts, progress)


def test_error_json_names_the_log_and_it_tells_what_happened(tmp_path: Path) -> None:
    root = tmp_path / "runs" / "a"
    with pytest.raises(RuntimeError):
        run(root, batches=3, fails_at=2)
    failure = read_failure(UPath(root))
    assert failure is not None
    assert failure.log == str(root / "logs" / "generate-0.log")
    begun, *done, failed = Path(failure.log).read_text().splitlines()
    form = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ generate rank 0 (INFO|ERROR) .+"
    assert all(re.fullmatch(form, line) for line in (begun, *done, failed))
    assert begun.split("INFO ")[1].startswith(f"process {failure.process} on {failure.host}")
    counts = [line.split(": ", 1)[1].rsplit(",", 1)[0] for line in done]
    assert counts == ["1 rows, 3 tokens"] * 2  # of batches 0 and 1
    assert failed.endswith("ERROR RuntimeError: [redacted] is not a number")


def test_a_process_that_starts_again_goes_on_in_the_file(tmp_path: Path) -> None:
    folder = UPath(tmp_path / "runs" / "a" / "patch" / "key")
    for step in (1, 2):
        with logged(folder, 1):
            log.info("step %d", step)
        forget()
    lines = (tmp_path / "runs/a/logs/patch-1.log").read_text().splitlines()
    assert ["step 1" in lines[1], "step 2" in lines[3], len(lines)] == [True, True, 4]


def test_another_stage_has_another_file(tmp_path: Path) -> None:
    root = UPath(tmp_path / "runs" / "a")
    for stage in ("pairs", "judge"):
        with logged(root / stage / "key", 0):
            log.info("of %s", stage)
    end_log()
    for stage in ("pairs", "judge"):
        assert [line.split("INFO ")[1] for line in lines_of(root, stage)][1:] == [f"of {stage}"]


def lines_of(root: UPath, stage: str) -> list[str]:
    path = log_path(root / stage / "key", 0)
    assert path
    return path.read_text().splitlines()


def test_it_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_log, "MOST_LINES", 5)
    root = UPath(tmp_path / "runs" / "a")
    with logged(root / "patch" / "key", 0):
        for step in range(20):
            log.info("%d %s", step, "x" * 10_000)
    end_log()
    lines = lines_of(root, "patch")
    assert [line.split()[5] for line in lines] == ["15", "16", "17", "18", "19"]
    assert {len(line) for line in lines} == {process_log.LONGEST_LINE}


def test_a_log_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    root = tmp_path / "runs" / "a"
    root.mkdir(parents=True)
    (root / "logs").write_text("a file where the folder should be")
    with logged(UPath(root / "patch" / "key"), 0):
        log.info("lost")
    end_log()
    assert (root / "logs").is_file()


@pytest.mark.parametrize("storage", ["/x", "memory://bucket", "relative"])
def test_it_lies_beside_the_runs_stages(storage: str) -> None:
    folder = UPath(storage) / "runs" / "a" / "judge" / "key" / "work" / "parts"
    assert str(log_path(folder, 3)) == str(UPath(storage) / "runs" / "a" / "logs" / "judge-3.log")
    assert log_path(UPath(storage) / "parts", 3) is None
