"""`qresafe` on a host that is a network namespace, for a driver beside another node than the head.

A driver joins the Ray node that it finds among the processes of its machine, a head first. Hosts
of `tests.cluster.namespaces` share their list of processes, so a driver on any of them would join
the head's node, under that node's address, and nobody would find it there.

    python -m bench.on_host generate cpu-smoke --workers 2
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

import psutil
from ray._private import services

from bench.fault_head import title
from qresafe.cli import main

FLAG = "--node_id="


def nodes_here() -> set[str]:
    """Return the ids of the Ray nodes on this host alone."""
    return {word.removeprefix(FLAG) for word in _words() if word.startswith(FLAG)}


def _words() -> Iterator[str]:
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if title(process) == "raylet" and _network(process.pid) == _network(os.getpid()):
                yield from process.cmdline()


def _network(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


if __name__ == "__main__":
    services.find_node_ids = nodes_here
    main()
