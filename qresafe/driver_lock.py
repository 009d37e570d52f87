"""One driver at a time on a run: a second one would remove what the first is writing.

On a file system that the operating system mounts (also NFS with its lock service) the kernel keeps
the lock, and gives it back when its process ends, however it ends. An object store has no locks:
there a record beside the run names the driver, which renews it. A record whose process is known to
be gone is taken over. One of another host is watched: renewed, its driver is there; taken over is
what looks old and is not renewed meanwhile. How old it looks is told by clocks, which may be wrong
or be set, so that alone decides nothing. Two drivers that begin within the same fraction of a
second can both get such a record.
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

from qresafe.artifacts import client_errors, is_local, output_errors, write_text
from qresafe.errors import ResourceError
from qresafe.integrity import tell
from qresafe.leftovers import process_began

PATIENCE = 0.5  # seconds; longer than `driver_of` takes to look at a lock
LOCK, RECORD = ".driver.lock", ".driver.json"
SETTLING = 0.5  # seconds between writing a record and believing that it is the last one
RENEW_SECONDS = 30.0  # how often a driver renews its record on an object store
STALE_SECONDS = 600.0  # not renewed for so long by the clocks: its host may be gone, too
WATCH_SECONDS = 75.0  # ... and is, if it does not renew its record in two turns and a half


class Driver(BaseModel):
    """Who works on a run."""

    model_config = ConfigDict(frozen=True)

    host: str
    process: int
    began: float  # when that process began (`process_began`): process ids are used again
    since: float  # when it took the run, in seconds since 1970
    seen: float  # when it last said that it is there
    renewed: int = 0  # how often it has said so

    @classmethod
    def here(cls) -> Driver:
        """Return this process as a driver."""
        now, process = time.time(), os.getpid()
        began = process_began(process) or 0.0
        return cls(host=socket.gethostname(), process=process, began=began, since=now, seen=now)

    def gone(self) -> bool:
        """Return whether it is a process of this host that runs no more."""
        return self.host == socket.gethostname() and process_began(self.process) != self.began

    def silent(self) -> bool:
        """Return whether it seems not to have said anything for long, or a clock is wrong."""
        return abs(time.time() - self.seen) > STALE_SECONDS

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
    driver = _read(root)
    if driver is None or not is_local(root):
        return None if driver is None or driver.gone() else driver
    return driver if _is_locked(root) else None


def working(root: UPath) -> Driver | None:
    """Return the driver that works on a run now; one that has been silent for long does not.

    For showing and planning: to take a run, `sole_driver` watches besides. A kernel's lock needs
    no words: its driver never renews the record.
    """
    driver = driver_of(root)
    return None if driver and driver.silent() and not is_local(root) else driver


def _read(root: UPath) -> Driver | None:
    try:
        return Driver.model_validate_json((root / RECORD).read_text())
    except (OSError, ValueError):  # there is none, or half of one
        return None


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
        with suppress(OSError):  # the lock alone counts, and what the block ended with
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
    with client_errors(root):
        mine = _take(root)
    over = threading.Event()
    renewing = threading.Thread(target=_renew, args=(root, mine, over), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        over.set()
        renewing.join()
        with suppress(Exception):  # a storage that is away must not hide how the block ended
            (root / RECORD).unlink()


def _take(root: UPath) -> Driver:
    """Write a record of this process, if nobody else has one, and return it."""
    found = driver_of(root)
    if found and not _falls_silent(root, found):
        raise _refused(root)
    mine = Driver.here()
    write_text(root / RECORD, mine.model_dump_json())
    time.sleep(SETTLING)  # who looked at the same time has written by then, and one of us is last
    found = driver_of(root)
    if found and (found.host, found.process, found.since) != (mine.host, mine.process, mine.since):
        raise _refused(root)  # it began at the same time, and wrote last
    return mine


def _falls_silent(root: UPath, driver: Driver) -> bool:
    """Watch a record; return whether nobody renews it until it counts as silent, or it goes.

    A driver that is there renews it within `RENEW_SECONDS`. So this takes long only where a host
    was lost a short while ago: a job that is tried again, on another host, goes on from there.
    """
    if driver.host == socket.gethostname() and not driver.silent():
        return False  # its process is known to run
    tell(f"{root} has a record of {driver}: watching whether that is still there")
    began = time.monotonic()
    while not driver.silent() or time.monotonic() < began + WATCH_SECONDS:
        time.sleep(min(WATCH_SECONDS / 10, 2.0))
        if (now := _read(root)) != driver:
            return now is None and not (root / RECORD).exists()
    return True


def _renew(root: UPath, mine: Driver, over: threading.Event) -> None:
    while not over.wait(RENEW_SECONDS):
        mine = mine.model_copy(update={"seen": time.time(), "renewed": mine.renewed + 1})
        with suppress(Exception):  # a storage that is away for a while; the next time will do
            write_text(root / RECORD, mine.model_dump_json())


def _refused(root: UPath) -> ResourceError:
    who = _read(root) or "another process"
    remedy = "wait until it ends, or give this run another --name"
    return ResourceError(f"this run has a driver already ({who})", where=str(root), remedy=remedy)
