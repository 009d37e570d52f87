"""`logs/<stage>-<rank>.log` of a run: what each process that computes has done of late.

Bounded, and written as a whole from a thread, as an object store cannot append. A line is there
after a second (on an object store, ten): so much is lost when a process is killed.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from upath import UPath

from qresafe.artifacts import is_local, write_text
from qresafe.errors import located, sentence

MOST_LINES, LONGEST_LINE = 1000, 500
SECONDS, REMOTE_SECONDS = 1.0, 10.0

log = logging.getLogger("qresafe.process")
log.setLevel(logging.INFO)
log.propagate = False  # what is only for the file must not reach the terminal


class ProcessLog(logging.Handler):
    """Keeps the last lines of a process in a file; a process that starts again goes on in it."""

    def __init__(self, path: UPath) -> None:
        super().__init__()
        self.path = path
        stage, _, rank = path.stem.rpartition("-")
        form = f"%(asctime)sZ {stage} rank {rank} %(levelname)s %(message)s"
        formatter = logging.Formatter(form, "%Y-%m-%dT%H:%M:%S")
        formatter.converter = time.gmtime
        self.setFormatter(formatter)
        self._lines = deque(_lines_of(path), MOST_LINES)
        self._pause = SECONDS if is_local(path) else REMOTE_SECONDS
        self._timer: threading.Timer | None = None

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(" ".join(self.format(record).split())[:LONGEST_LINE])
        if self._timer is None:
            self._timer = threading.Timer(self._pause, self.flush)
            self._timer.daemon = True
            self._timer.start()

    def flush(self) -> None:
        """Write the file; a full disk or a store that is away costs the log, not the run."""
        with self.lock or threading.RLock():
            if self._timer is None:
                return
            self._timer.cancel()
            self._timer = None
            text = "\n".join(self._lines) + "\n"
        with suppress(Exception):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, text)


def log_path(folder: UPath, rank: int | str) -> UPath | None:
    """Return the log of a rank that works in <storage>/runs/<run>/<stage>/...; None elsewhere."""
    for inner in (folder, *folder.parents):
        if inner.parent.parent.name == "runs":
            return inner.parent / "logs" / f"{inner.name}-{rank}.log"
    return None


@contextmanager
def logged(folder: UPath, rank: int) -> Iterator[None]:
    """Have this process's `log` written beside the run's stages; an error's place names the file.

    The file stays open after the block, for the next one of the same stage.

    Args:
        folder: Where the block works.
        rank: Of this process among those that do.
    """
    path = log_path(folder, rank)
    if path is None:
        yield
        return
    handler = _opened(path)
    try:
        with located(log=str(path)):
            yield
    except Exception as error:
        log.error("%s", sentence(error))
        handler.flush()
        raise


def end_log() -> None:
    """Write what is not yet written; for a process that may be ended any moment."""
    for handler in log.handlers:
        handler.flush()


def _opened(path: UPath) -> logging.Handler:
    for handler in list(log.handlers):
        if isinstance(handler, ProcessLog) and handler.path == path:
            return handler
        handler.flush()
        log.removeHandler(handler)
    opened = ProcessLog(path)
    log.addHandler(opened)
    log.info("process %d on %s", os.getpid(), socket.gethostname())
    return opened


def _lines_of(path: UPath) -> list[str]:
    with suppress(Exception):
        return path.read_text().splitlines()
    return []
