"""How a driver shows what its workers do: rank 0 posts to a small actor, a thread looks at it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from qresafe.errors import UserError
from qresafe.progress import Progress

POLL_SECONDS = 0.3


class Board:
    """The actor: the last position that was posted, and the first error."""

    def __init__(self) -> None:
        self._state: tuple[int, str] = (0, "")
        self._error: UserError | None = None
        self._groups = 0

    def begin(self) -> int:
        """Note that a group of workers begins; return how many did before."""
        self._groups += 1
        return self._groups - 1

    def post(self, done: int, note: str) -> None:
        self._state = (done, note)

    def fail(self, error: UserError) -> None:
        self._error = self._error or error

    def state(self) -> tuple[int, str]:
        return self._state

    def error(self) -> UserError | None:
        return self._error


class Posted:
    """A worker's `Progress`: posts its absolute position, so a restart counts nothing twice.

    Args:
        board: Handle of the `Board`.
    """

    def __init__(self, board: Any) -> None:
        self._board, self._done = board, 0

    def start(self, stage: str, total: int | None = None, unit: str = "") -> None:
        pass

    def advance(self, done: int = 1, note: str = "") -> None:
        self._done += done
        self._board.post.remote(self._done, note)

    def finish(self, note: str = "", reused: bool = False) -> None:
        pass

    def beside(self) -> Progress:
        return self


@contextmanager
def shown(board: Any, progress: Progress) -> Iterator[None]:
    """Show in the driver, from a thread, what a worker posts while the block runs."""
    ended = threading.Event()
    position = 0

    def look() -> None:
        nonlocal position
        done, note = ray.get(board.state.remote())
        if done > position:
            progress.advance(done - position, note)
            position = done

    def watch() -> None:
        while not ended.wait(POLL_SECONDS):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        look()
