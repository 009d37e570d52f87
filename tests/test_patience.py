"""Storage that answers with 500s, late or not at all: asked again, then one sentence."""

from __future__ import annotations

import errno
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from upath import UPath

from qresafe import patience
from qresafe.artifacts import Run, disk_errors, read_text, write_text
from qresafe.errors import ResourceError
from qresafe.patience import PAUSES, passes, patiently
from qresafe.progress import Silent
from qresafe.stages.runtime import (
    Batch,
    BatchFunction,
    InProcessRuntime,
    Row,
    read_parts,
    write_table,
)

TRIES = len(PAUSES) + 1


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses are written down, not waited for."""
    slept: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", slept.append)
    return slept


class FlakyFileSystem(MemoryFileSystem):
    """An object store that fails to read or write a file when `fails` says so."""

    protocol = "flaky"
    fails: Callable[[], BaseException | None] = staticmethod(lambda: None)

    def _maybe_fail(self) -> None:
        if error := type(self).fails():
            raise error

    def cat_file(self, path: str, *args: Any, **more: Any) -> bytes:
        self._maybe_fail()
        return bytes(super().cat_file(path, *args, **more))

    def _open(self, path: str, mode: str = "rb", *args: Any, **more: Any) -> Any:
        self._maybe_fail()
        return super()._open(path, mode, *args, **more)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[UPath]:
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    root = UPath(f"flaky://store-{random.random()}")
    root.mkdir(parents=True)
    yield root
    FlakyFileSystem.fails = staticmethod(lambda: None)


def failing(times: int, error: BaseException) -> Callable[[], BaseException | None]:
    """Return what fails so often, and then works."""
    answers = itertools.chain([error] * times, itertools.repeat(None))
    return staticmethod(lambda: next(answers))


class Answer(Exception):
    """An error of a client that is no OSError, as botocore's and aiohttp's are."""

    __module__ = "botocore.exceptions"

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EIO, "500"), TimeoutError("slow"), Answer(503), ConnectionResetError("gone")],
)
def test_what_passes_is_asked_again_with_growing_pauses(
    store: UPath, pauses: list[float], error: BaseException
) -> None:
    FlakyFileSystem.fails = failing(3, error)
    write_text(store / "a", "whole")
    FlakyFileSystem.fails = failing(TRIES - 1, error)
    assert read_text(store / "a") == "whole"
    assert len(pauses) == 3 + TRIES - 1
    for pause, longest in zip(pauses, PAUSES[:3] + PAUSES, strict=True):
        assert longest / 2 <= pause <= longest


def test_what_does_not_pass_ends_in_one_sentence(store: UPath, pauses: list[float]) -> None:
    FlakyFileSystem.fails = failing(TRIES, OSError(errno.EIO, "internal error"))
    told = r"the storage does not answer \(.*internal error\) in .*a: see that it is there, and run"
    with pytest.raises(ResourceError, match=told):
        write_text(store / "a", "whole")
    assert sum(pauses) <= sum(PAUSES) < 32


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ENOSPC])
def test_what_waiting_does_not_mend_is_not_waited_for(pauses: list[float], number: int) -> None:
    def fail() -> None:
        raise OSError(number, "x")

    with pytest.raises(OSError, match="x"):
        patiently(fail, "there")
    assert pauses == []


def test_which_errors_pass() -> None:
    assert [s for s in (200, 400, 403, 404, 408, 429, 500, 502, 503) if passes(Answer(s))] == [
        408, 429, 500, 502, 503,
    ]  # fmt: skip
    assert not passes(ValueError("x"))
    assert not passes(OSError("an error without a number"))
    own = type("CodedError", (Exception,), {"status": 500})
    assert not passes(own())  # no client of a storage


def test_a_client_that_gives_up_in_a_stage_is_one_sentence() -> None:
    with pytest.raises(ResourceError, match=r"does not answer \(HTTP 503\) in s3://b"):  # noqa: SIM117
        with disk_errors("s3://b"):
            raise Answer(503)


class Doubled:
    """A `BatchJob` that doubles x."""

    def setup(self, device: str) -> BatchFunction:
        def double(rows: list[Row]) -> pa.Table:
            return pa.table({"x": [2 * row["x"] for row in rows]})

        return double


def stage_on(root: UPath) -> list[int]:
    """Run a stage of ten batches and read what it made."""

    def work(folder: UPath) -> dict[str, Any]:
        batches = [Batch(i, [{"x": i}]) for i in range(10)]
        parts = folder / "work" / "parts"
        InProcessRuntime().map_batches(Doubled(), batches, parts, Silent())
        table = read_parts(parts, 10)
        write_table(folder / "table.parquet", table)
        return {"sum": sum(table["x"].to_pylist())}

    run = Run(str(root), "r")
    made = run.stage("s", spec={}, inputs={}, code_version=1, work=work)
    again = run.stage("s", spec={}, inputs={}, code_version=1, work=work)
    assert again.reused
    assert again.manifest == made.manifest
    return [made.manifest.counts["sum"]]


def test_a_stage_on_a_storage_that_fails_every_third_time(
    store: UPath, pauses: list[float]
) -> None:
    draw = random.Random(0)
    error = OSError(errno.EIO, "500")
    FlakyFileSystem.fails = staticmethod(lambda: error if draw.random() < 1 / 3 else None)
    assert stage_on(store) == [sum(2 * i for i in range(10))]
    assert len(pauses) > 5
