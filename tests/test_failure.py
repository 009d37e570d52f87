"""error.json: what is told of a failure, that it holds no secret, and when it goes."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from upath import UPath

from qresafe import patience
from qresafe.driving import driving
from qresafe.errors import DataError, ResourceError, SpecError, causes, located, place_of
from qresafe.failure import describe, read_failure
from qresafe.progress import Silent
from qresafe.redaction import redact

SECRET = "s3cr3t-value-of-the-token"


def fail(root: UPath, error: BaseException) -> None:
    def work() -> None:
        with driving(root, Silent()) as progress:
            progress.start("generate Q0", 8, "completions")
            with located(rank=1, records=["p1", "p2"]):
                raise error

    with pytest.raises(type(error)):
        work()


def test_a_failure_is_told_replaced_and_removed(tmp_path: Path) -> None:
    root = UPath(tmp_path / "runs" / "a")
    fail(root, DataError("bad row", where="pairs.csv", remedy="mend it"))
    told = read_failure(root)
    assert told is not None
    assert (told.stage, told.kind, told.rank) == ("generate Q0", "data", 1)
    assert (told.what, told.where, told.hint) == ("bad row", "pairs.csv", "mend it")
    assert (told.records, told.process, told.trace) == (["p1", "p2"], os.getpid(), [])
    fail(root, MemoryError())
    again = read_failure(root)
    assert again is not None
    assert (again.kind, again.what) == ("out of memory", "MemoryError")
    assert "batch_size" in again.hint
    with driving(root, Silent()):
        pass
    assert read_failure(root) is None
    assert sorted(path.name for path in Path(str(root)).iterdir()) == [".driver.lock"]


class EndpointConnectionError(Exception):
    """Named as botocore's, which is no OSError either."""

    __module__ = "botocore.exceptions"


@pytest.mark.parametrize("ending", [None, KeyboardInterrupt(), SpecError("unknown key 'x'")])
def test_a_storage_that_is_away_at_the_end_does_not_hide_the_ending(
    ending: BaseException | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = UPath(f"memory://away-{time.monotonic_ns()}/runs/a")
    monkeypatch.setattr(patience, "PAUSES", ())

    def away(*_: object, **__: object) -> None:
        raise EndpointConnectionError("Could not connect to the endpoint URL")

    expected = pytest.raises(type(ending)) if ending else nullcontext()
    with expected as caught, driving(root, Silent()):
        for name in ("_open", "info", "exists", "rm", "rm_file", "_rm"):
            monkeypatch.setattr(type(root.fs), name, away)
        if ending:
            raise ending
    assert ending is None or caught.value is ending


def test_a_bug_has_a_trace_and_ctrl_c_has_none() -> None:
    def broken() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError) as caught, located():
        broken()
    told = describe(caught.value, "")
    assert (told.kind, told.what) == ("bug", "KeyError: 'x'")
    assert told.trace[-1].startswith(f"{__file__}:")
    assert told.trace[-1].endswith("in broken")
    assert describe(KeyboardInterrupt(), "patch").kind == "stopped"
    assert describe(SystemExit(143), "patch").trace == []


class Wrapper(Exception):
    """As Ray's own: the error that a worker raised is its `cause`, not its `__cause__`."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("a traceback as text")
        self.cause = cause


def test_what_a_worker_knew_survives_the_way_to_the_driver() -> None:
    with pytest.raises(ResourceError) as caught, located(rank=3), located(records=["p7"]):
        raise ResourceError("too little", remedy="add some")
    there = pickle.loads(pickle.dumps(caught.value))
    outer = RuntimeError("failed")
    outer.__cause__ = Wrapper(there)
    assert place_of(outer)["rank"] == 3
    assert place_of(outer)["records"] == ["p7"]
    told = describe(outer, "patch")
    assert (told.kind, told.what, told.rank) == ("resources", "too little", 3)
    assert list(causes(outer)) == [outer, there]


class ActorDiedError(Exception):
    """Named as Ray's."""


def test_lost_workers_are_told_from_want_of_memory() -> None:
    assert describe(ActorDiedError("the actor died"), "judge").kind == "worker lost"
    low = ActorDiedError("killed: the node was running low on memory")
    assert describe(low, "judge").kind == "out of memory"


@pytest.mark.parametrize(
    "text",
    [
        f"401 for {SECRET}",
        "https://me:hunter22@host/x refused",
        "hf_abcdefghijklmnopqrstuvwxyz is no token",
        "Authorization: Bearer abcdef0123456789",
    ],
)
def test_no_secret_is_written(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", SECRET)
    root = UPath(tmp_path / "runs" / "a")
    fail(root, ResourceError(text, where=text, remedy=text))
    written = "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    assert '"kind": "resources"' in written
    for secret in (SECRET, "hunter22", "hf_abcdef", "abcdef0123456789"):
        assert secret not in written


def test_ordinary_words_stay() -> None:
    text = "http://127.0.0.1:8265 answers 404; see /home/me/.aws/credentials, sk-learn"
    assert redact(text) == text


def test_a_terminated_command_says_that_it_was_stopped(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from upath import UPath
from qresafe.driving import driving
from qresafe.progress import Silent
with driving(UPath(sys.argv[1]), Silent()) as progress:
    progress.start("patch", 30, "steps")
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()
"""
    root = tmp_path / "runs" / "a"
    ended = subprocess.run([sys.executable, "-c", code, str(root)], timeout=60)
    assert ended.returncode == 128 + signal.SIGTERM
    told = read_failure(UPath(root))
    assert told is not None
    assert (told.kind, told.stage) == ("stopped", "patch")
