"""How much memory is free on this machine, within its container's limit where there is one."""

from __future__ import annotations

from pathlib import Path

CGROUPS = (  # second version and first: limit, used
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def free_memory() -> int:
    """Return the bytes that a process may still take."""
    import psutil

    free, limit = psutil.virtual_memory().available, container_room()
    return int(free if limit is None else min(free, limit))


def container_room(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return what a cgroup leaves free in bytes, or None outside of one.

    Files that were read and lie in the page cache count as used there, and are given up at need;
    so the part of them that is not in use is free.
    """
    for limit, used in CGROUPS:
        try:
            taken = int((root / used).read_text()) - _cached(root / used)
            return max(0, int((root / limit).read_text()) - taken)
        except (OSError, ValueError):  # no such cgroup, or "max"
            continue
    return None


def _cached(used: Path) -> int:
    stat = used.with_name("memory.stat").read_text().split()
    return int(dict(zip(stat[::2], stat[1::2], strict=False)).get("inactive_file", 0))
