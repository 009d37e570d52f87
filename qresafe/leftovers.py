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


def sweep(folder: Path) -> None:
    """Remove what processes of this host that no longer run left half-written under `folder`.

    What another host or a live process writes there stays: it may be about to rename it.
    """
    for path in sorted(folder.rglob(f"*{MARK}*")):
        found = NAME.search(path.name)
        if not found or found["host"] != socket.gethostname() or _runs(int(found["process"])):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def process_began(process: int) -> float | None:
    """Return when a process of this host began (seconds since 1970); None if it is not there."""
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
