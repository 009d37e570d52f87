"""One driver at a time on a run: a second one would remove what the first is writing.

On a file system that the operating system mounts (also NFS with its lock service) the kernel keeps
the lock, and gives it back when its process ends, however it ends. An object store has no locks:
there a record beside the run names the driver, which renews it. A record that is not renewed any
more, or whose process is known to be gone, is taken over. Two drivers that begin within the same
fraction of a second can both get such a record.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict
from upath import UPath

from qresafe.artifacts import is_local, output_errors, write_text
from qresafe.errors import ResourceError
from qresafe.leftovers import process_began

PATIENCE = 0.5  # seconds; longer than `driver_of` takes to look at a lock
LOCK, RECORD = ".driver.lock", ".driver.json"
RENEW_SECONDS = 30.0  # how often a driver renews its record on an object store
STALE_SECONDS = 600.0  # not renewed for so long: its host is gone, too


class Driver(BaseModel):
    """Who works on a run."""

    model_config = ConfigDict(frozen=True)

    host: str
    process: int
    began: float  # when that process began: process ids are used again
    since: float  # when it took the run; seconds since 1970, like the others
    seen: float  # when it last said that it is there

    @classmethod
    def here(cls) -> Driver:
        """Return this process as a driver."""
        now, process = time.time(), os.getpid()
        began = process_began(process) or 0.0
        return cls(host=socket.gethostname(), process=process, began=began, since=now, seen=now)

    def gone(self) -> bool:
        """Return whether it certainly, or by its long silence, works no more."""
        if time.time() - self.seen > STALE_SECONDS:
            return True
        return self.host == socket.gethostname() and process_began(self.process) != self.began

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since, UTC).strftime("%Y-%m-%d %H:%M UTC")
        return f"process {self.process} on {self.host}, since {since}"


@contextmanager
def sole_driver(root: UPath) -> Iterator[None]:
    """Hold a run for this process, until the block ends or the process does.

    Args:
        root: The run's folder, <storage>/runs/<name>.

    Raises:
        ResourceError: Another driver holds it.
    """
    with output_errors(root):
        root.mkdir(parents=True, exist_ok=True)
    with _locked(root) if is_local(root) else _recorded(root):
        yield


def driver_of(root: UPath) -> Driver | None:
    """Return the driver that works on a run now, as far as its record tells."""
    try:
        driver = Driver.model_validate_json((root / RECORD).read_text())
    except (OSError, ValueError):  # there is none, or half of one
        return None
    if not is_local(root):
        return None if driver.gone() else driver
    return driver if _is_locked(root) else None


@contextmanager
def _locked(root: UPath) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(str(root / LOCK), timeout=PATIENCE, poll_interval=0.05)
    try:
        lock.acquire()
    except Timeout:
        raise _refused(root) from None
    try:
        write_text(root / RECORD, Driver.here().model_dump_json())
        yield
    finally:
        (root / RECORD).unlink(missing_ok=True)
        lock.release()


def _is_locked(root: UPath) -> bool:
    from filelock import FileLock, Timeout

    try:
        with FileLock(str(root / LOCK), timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # not ours to write: say what the record says
        return True


@contextmanager
def _recorded(root: UPath) -> Iterator[None]:
    if driver_of(root):
        raise _refused(root)
    mine, over = Driver.here(), threading.Event()
    write_text(root / RECORD, mine.model_dump_json())
    found = driver_of(root)
    if found and (found.host, found.process, found.since) != (mine.host, mine.process, mine.since):
        raise _refused(root)  # it began at the same time, and wrote last
    renewing = threading.Thread(target=_renew, args=(root, mine, over), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        over.set()
        renewing.join()
        with suppress(OSError):
            (root / RECORD).unlink()


def _renew(root: UPath, mine: Driver, over: threading.Event) -> None:
    while not over.wait(RENEW_SECONDS):
        with suppress(Exception):  # a storage that is away for a while; the next time will do
            seen = mine.model_copy(update={"seen": time.time()})
            write_text(root / RECORD, seen.model_dump_json())


def _refused(root: UPath) -> ResourceError:
    try:
        who = str(Driver.model_validate_json((root / RECORD).read_text()))
    except (OSError, ValueError):
        who = "another process"
    remedy = "wait until it ends, or give this run another --name"
    return ResourceError(f"this run has a driver already ({who})", where=str(root), remedy=remedy)
