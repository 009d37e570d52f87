"""What the one driver of a run leaves in its folder besides results: progress and failures."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from upath import UPath

from qresafe.driver_lock import sole_driver
from qresafe.failure import failures_recorded, record_failure
from qresafe.progress import Both, Progress
from qresafe.progress_file import ProgressFile

_driven: list[tuple[UPath, ProgressFile]] = []  # the runs that this process drives


@contextmanager
def driving(root: UPath, progress: Progress) -> Iterator[Progress]:
    """Hold a run for this process, and keep its `progress.json` and `error.json`.

    Args:
        root: The run's folder, <storage>/runs/<name>.
        progress: What a person sees.

    Returns:
        The `Progress` for the stages: what it is told is shown, and written to the folder.

    Raises:
        ResourceError: Another driver holds the run.
    """
    with (
        sole_driver(root),
        _terminated(),
        ProgressFile(root) as file,
        failures_recorded(root, file.stage),
        _listed(root, file),
    ):
        yield Both(progress, file)


def forewarn(error: BaseException) -> None:
    """Note in what this process drives why it may end without a word, from any thread.

    The next success or failure replaces the note.
    """
    for root, file in tuple(_driven):
        record_failure(root, error, file.stage())


def abandon(error: BaseException) -> None:
    """Leave what this process drives as failed, from any thread, because the process ends now."""
    forewarn(error)
    for _, file in tuple(_driven):
        file.close()


@contextmanager
def _listed(root: UPath, file: ProgressFile) -> Iterator[None]:
    _driven.append((root, file))
    try:
        yield
    finally:
        _driven.remove((root, file))


@contextmanager
def _terminated() -> Iterator[None]:
    """Let SIGTERM end the process as Ctrl-C does: with what is left to write written.

    Ray, once it is started, does the same with a handler of its own.
    """

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
