"""`error.json`: why a run failed, for whoever looks at its folder later.

It lies beside the run's stages, holds no secrets, is replaced by the next failure and removed by
the next success.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pydantic import BaseModel, ConfigDict
from upath import UPath

from qresafe import errors
from qresafe.artifacts import write_text
from qresafe.patience import patiently
from qresafe.redaction import redact

FILE = "error.json"
MOST_RECORDS = 20  # of a batch, that are named

KINDS: dict[type[errors.UserError], str] = {
    errors.SpecError: "spec",
    errors.DataError: "data",
    errors.ModelError: "model",
    errors.ResourceError: "resources",
    errors.DivergedError: "diverged",
    errors.CorruptArtifactError: "corrupt artefact",
}
OUT_OF_MEMORY, LOST, STOPPED, BUG = "out of memory", "worker lost", "stopped", "bug"
HINTS = {
    OUT_OF_MEMORY: "lower the batch size (evaluate.generate.batch_size, patch.micro_batch_size)",
    STOPPED: "give the same command again to continue: what is finished is kept",
    BUG: "report it, with this file and the output of `qresafe doctor --json`",
}

# Ray's errors, by name: it is not imported here.
_LOST = {"RayActorError", "ActorDiedError", "WorkerCrashedError", "NodeDiedError"}
_LOST |= {"WorkerHealthCheckFailedError", "WorkerHealthCheckTimeoutError"}


class Failure(BaseModel):
    """Why a run failed.

    Attributes:
        time: When (seconds since 1970).
        stage: The stage that was running, empty between two.
        kind: One of `KINDS`, "out of memory", "worker lost", "stopped" (Ctrl-C, SIGTERM), "bug".
        what: What is wrong, in words.
        where: The file, key, row or model that it was found in.
        hint: What to do about it.
        rank: Of the training process; None: not one of several.
        records: Ids of the records that were being worked on, the first few.
        host: Where it arose.
        process: There, its id.
        log: The log of that process.
        trace: "file:line in function", the innermost last; for a bug.
    """

    model_config = ConfigDict(frozen=True)

    time: float
    stage: str
    kind: str
    what: str
    where: str = ""
    hint: str = ""
    rank: int | None = None
    records: list[str] = []
    host: str = ""
    process: int = 0
    log: str = ""
    trace: list[str] = []


@contextmanager
def failures_recorded(root: UPath, stage: Callable[[], str]) -> Iterator[None]:
    """Write `error.json` if the block fails, remove an older one if it does not.

    Args:
        root: The run's folder, held by this process.
        stage: Names the stage that is running.
    """
    try:
        yield
    except BaseException as error:
        record_failure(root, error, stage())
        raise
    with suppress(Exception):  # what was made counts, not the note on an earlier failure
        patiently(lambda: (root / FILE).unlink(missing_ok=True), root / FILE)


def record_failure(root: UPath, error: BaseException, stage: str) -> None:
    """Write `error.json`, if that can be done.

    Args:
        root: The run's folder, held by this process.
        error: What ended the command.
        stage: The stage that was running.
    """
    # The storage itself may be what failed, and its clients have errors of their own.
    with suppress(Exception):
        write_text(root / FILE, describe(error, stage).model_dump_json(indent=1))


def read_failure(root: UPath) -> Failure | None:
    """Return why a run's last command failed, None if it did not."""
    try:
        return Failure.model_validate_json((root / FILE).read_text())
    except (OSError, ValueError):
        return None


def describe(error: BaseException, stage: str) -> Failure:
    """Return what is known of an error, without secrets."""
    chain = list(errors.causes(error))
    mistake = next((each for each in chain if isinstance(each, errors.UserError)), None)
    root = mistake or chain[-1]
    place = errors.place_of(error)
    kind = str(place.get("kind") or kind_of(error))
    told = {
        "what": mistake.what if mistake else place.get("what") or errors.sentence(root),
        "where": mistake.where if mistake else "",
        "hint": (mistake.remedy if mistake else "") or HINTS.get(kind, ""),
    }
    return Failure(
        time=time.time(),
        stage=stage,
        kind=kind,
        **{name: redact(text) for name, text in told.items()},
        rank=place.get("rank"),
        records=[str(record) for record in place.get("records", [])][:MOST_RECORDS],
        host=place.get("host", socket.gethostname()),
        process=place.get("process", os.getpid()),
        log=place.get("log", ""),
        trace=place.get("trace") or errors.frames(root) if kind == BUG else [],
    )


def here(**more: Any) -> dict[str, Any]:
    """Return this process, as the place of an error, and what else is known of it."""
    return {"host": socket.gethostname(), "process": os.getpid(), **more}


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of Python, torch or Ray says that memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)  # torch's CPU allocator and Ray's dead actors have no type of their own
    return "can't allocate memory" in text or "running low on memory" in text


def kind_of(error: BaseException) -> str:
    """Return what kind of failure an error is; see `Failure`."""
    chain = list(errors.causes(error))
    mistake = next((each for each in chain if isinstance(each, errors.UserError)), None)
    if any(is_out_of_memory(each) for each in chain):
        return OUT_OF_MEMORY
    if mistake:
        return KINDS.get(type(mistake), "mistake")
    if isinstance(chain[0], KeyboardInterrupt | SystemExit):
        return STOPPED
    return LOST if _LOST & {type(each).__name__ for each in chain} else BUG
