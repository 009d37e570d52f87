"""Files that are written aside and then renamed: their names, and those that a kill left behind."""

from __future__ import annotations

import os
import re
import shutil
import socket
import threading
from pathlib import Path

MARK = ".tmp-"
NAME = re.compile(rf"{re.escape(MARK)}(?P<process>\d+)-\d+-(?P<host>.+)$")


def aside(path: object) -> str:
    """Return a name beside `path` that no other process, thread or host uses."""
    return f"{path}{MARK}{os.getpid()}-{threading.get_ident()}-{socket.gethostname()}"


def sweep(folder: Path, *, below: bool = True) -> None:
    """Remove what processes of this host that no longer run left half-written in `folder`.

    What another host or a live process writes there stays: it may be about to rename it.

    Args:
        folder: A local one.
        below: Also in the folders below it.
    """
    for path in sorted((folder.rglob if below else folder.glob)(f"*{MARK}*")):
        found = NAME.search(path.name)
        if not found or found["host"] != socket.gethostname() or _runs(int(found["process"])):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def process_began(process: int) -> float | None:
    """Return when a process of this host began, in seconds since the host did; None: no process.

    A clock that is set does not change it, as it would the time since 1970.
    """
    try:
        stat = Path(f"/proc/{process}/stat").read_bytes()
    except FileNotFoundError:
        return None if Path("/proc/self").exists() else _create_time(process)
    after_name = stat.rpartition(b")")[2].split()  # the name may hold anything
    return int(after_name[19]) / os.sysconf("SC_CLK_TCK")


def _create_time(process: int) -> float | None:
    import psutil

    try:
        return float(psutil.Process(process).create_time())
    except psutil.NoSuchProcess:
        return None


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it runs, as somebody else
        return True
    return True
