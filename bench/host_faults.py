"""Faults of whole hosts, each a network namespace of this machine: docs/reliability/host-faults.md.

    python -m bench.host_faults                       # every fault once in generate and in patch
    python -m bench.host_faults --keep redis --redis-server /usr/bin/redis-server
    python -m bench.host_faults --only isolate --workload patch --page /tmp/page.md

A head that computes nothing, and two hosts with a CPU each that share a folder; the driver is on
the first of them. A host is cut off the network and comes back, or the head is killed and started
again, with or without a store that keeps what its GCS knows. As in `bench.faults`, the command is
run again until it ends well, and its result is compared with that of a run without faults. Needs
root and iproute2.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import psutil

from bench.fault_head import is_dead, title
from bench.fault_kinds import Deed, Fault, Kind
from bench.fault_page import host_page
from bench.fault_runs import GENERATE, PATCH, Workload
from bench.faults import Bench, read
from tests.cluster.namespaces import Hosts

PAGE = Path(__file__).parents[1] / "docs" / "reliability" / "host-faults.md"
RESULTS = Path(".bench/host-faults.jsonl")
HEAD, DRIVER, WORKERS = 0, 1, (1, 2)
UNPLUGGED = (4.0, 12.0)  # seconds; Ray gives a node up after five missed checks, 15 s at least
GIVEN_UP = 120.0  # ... and after at most so many seconds: 5 checks that wait 10 s each, 3 s apart
EARLY = 0.5  # of the time that workers work: something is left to do when a host is gone
BACK_SECONDS = 60.0  # for a raylet that was given up to see it, and end
DEEDS: tuple[Deed, ...] = ("unplug", "isolate", "restart")
Keep = Literal["nothing", "rocksdb", "redis"]
REDIS_PORT = 6390
STORES: dict[Keep, str] = {
    "nothing": "without what it knew",
    "rocksdb": "its state kept by RocksDB on a disk",
    "redis": "its state kept by Redis",
}
# Runs on the head without joining the cluster: prints the addresses of living nodes.
ALIVE = """
import sys
from ray._raylet import GcsClient
nodes = GcsClient(address=sys.argv[1]).get_all_node_info().values()
print(*(node.node_manager_address for node in nodes if node.state == node.ALIVE))
"""


class HostCluster:
    """A `Cluster` of three hosts.

    Args:
        keep: Where the head keeps what its GCS knows: nowhere, on its own disk, or in Redis.
        redis_server: Redis's program, for `keep="redis"`.
    """

    def __init__(self, keep: Keep = "nothing", redis_server: str = "redis-server") -> None:
        self._hosts = Hosts(1 + len(WORKERS)).__enter__()
        self.folder, self.keep, self._redis = self._hosts.folder, keep, None
        if keep == "redis":
            self._redis = self._start_redis(redis_server)

    def environment(self) -> dict[str, str]:
        return self._hosts.env | {"RAY_ADDRESS": self._hosts.address}

    def start(self) -> None:
        if not self._has(HEAD, "gcs_server") or not self._has(HEAD, "raylet"):
            for host in (HEAD, *WORKERS):
                self._hosts.kill(host)
            self.start_head()
        for host in WORKERS:
            if not self._has(host, "raylet"):
                self._hosts.kill(host)
                self._hosts.start_worker(host)

    def start_head(self) -> None:
        """Start the head; what an earlier one kept is found again."""
        stores = {
            "nothing": {},
            "rocksdb": {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": f"{self.folder}/gcs"},
            "redis": {"RAY_REDIS_ADDRESS": f"{self._hosts.outside}:{REDIS_PORT}"},
        }
        # `ray start` takes the other hosts' nodes, in the list of processes that all hosts share,
        # for a head that still runs here, if this file of the lost one says that it did.
        (self._hosts.behind(HEAD) / "ray" / "ray_current_cluster").unlink(missing_ok=True)
        self._hosts.start_head(cpus=0, env=stores[self.keep])

    def kill_head(self) -> None:
        """End every process of the head's host."""
        self._hosts.kill(HEAD)

    def unplug(self, host: int, seconds: float) -> None:
        """Cut a host off the network for so long."""
        self._hosts.cut(host)
        time.sleep(seconds)
        self._hosts.restore(host)

    def isolate(self, host: int) -> None:
        """Cut a host off until Ray has given its node up; its node is started again once back."""
        raylets = [p for p in self._hosts.processes(host) if title(p) == "raylet"]
        self._hosts.cut(host)
        deadline = time.monotonic() + GIVEN_UP
        while self.is_alive(host) and time.monotonic() < deadline:
            time.sleep(1)
        self._hosts.restore(host)
        deadline = time.monotonic() + BACK_SECONDS
        while not all(map(is_dead, raylets)) and time.monotonic() < deadline:
            time.sleep(0.2)
        self.start()

    def is_alive(self, host: int) -> bool:
        """Return whether the head counts a host's node as alive."""
        told = self._hosts.run(HEAD, [sys.executable, "-c", ALIVE, self._hosts.address])
        return self._hosts.ips[host] in told.stdout.split()

    def host_of(self, process: psutil.Process) -> int:
        """Return the host that a process is on."""
        return next(h for h in WORKERS if process in self._hosts.processes(h))

    def processes(self, *titles: str) -> list[psutil.Process]:
        found = [p for host in (HEAD, *WORKERS) for p in self._hosts.processes(host)]
        named = [p for p in found if any(each in title(p) for each in titles)]
        return sorted(named, key=lambda process: process.pid)

    def popen(self, words: Sequence[str], log: BinaryIO) -> subprocess.Popen[Any]:
        env = {"RAY_ADDRESS": self._hosts.address}
        root = Path(__file__).parents[1]
        words = ["bench.on_host" if word == "qresafe.cli" else word for word in words]
        return self._hosts.popen(DRIVER, words, env=env, stdout=log, stderr=log, cwd=root)

    def end(self) -> None:
        if self._redis:
            self._redis.kill()
            self._redis.wait()
        self._hosts.__exit__()

    def _has(self, host: int, program: str) -> bool:
        return any(title(p) == program for p in self._hosts.processes(host))

    def _start_redis(self, program: str) -> subprocess.Popen[bytes]:
        words = [program, "--bind", self._hosts.outside, "--port", str(REDIS_PORT)]
        words += ["--protected-mode", "no", "--dir", str(self.folder)]
        return subprocess.Popen(words, stdout=subprocess.DEVNULL)


class HostFault(Fault):
    """A fault of a host: of the one that has the chosen worker and not the driver, or the head."""

    _head: HostCluster

    def moment(self, lasted: Mapping[str, float], baseline: float) -> float:
        return self._draw.uniform(0, EARLY * min(lasted.values()))

    def victims(self, driver: int) -> list[psutil.Process]:
        found = self._head.processes(*next(iter(self._workload.targets.values())))
        if self.kind.target == "head":
            return found
        return [process for process in found if self._head.host_of(process) != DRIVER]

    def _do(self, chosen: Sequence[psutil.Process]) -> None:
        if self.kind.deed == "restart":
            self._head.kill_head()
            self._head.start_head()
        elif self.kind.deed == "unplug":
            self._head.unplug(self._head.host_of(chosen[0]), self._draw.uniform(*UNPLUGGED))
        else:
            self._head.isolate(self._head.host_of(chosen[0]))


def faults(
    only: Sequence[Deed], names: Sequence[str], seed: int
) -> Iterator[tuple[Workload, Kind, random.Random]]:
    """Yield every fault that is asked for, each with randomness of its own."""
    for deed in only:
        for workload in (GENERATE, PATCH):
            if workload.name in names:
                kind = Kind(deed, "head" if deed == "restart" else "host")
                yield workload, kind, random.Random(f"{seed} {deed} {workload.name}")


def main() -> None:
    """Inject the faults, and write the page from all results so far."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=DEEDS, default=DEEDS)
    parser.add_argument("--workload", nargs="+", default=[GENERATE.name, PATCH.name])
    parser.add_argument("--keep", choices=get_args(Keep), default="nothing")
    parser.add_argument("--redis-server", default="redis-server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    args.results.parent.mkdir(parents=True, exist_ok=True)
    cluster = HostCluster(args.keep, args.redis_server)
    with (
        tempfile.TemporaryDirectory(prefix="qf", dir="/tmp") as folder,
        closing(Bench(Path(folder), cluster)) as bench,
        open(args.results, "a") as kept,
    ):
        for workload, kind, draw in faults(args.only, args.workload, args.seed):
            if found := bench.hit(workload, kind, draw, HostFault):
                if kind.deed == "restart":
                    found = replace(found, kind=f"{found.kind}, {STORES[args.keep]}")
                kept.write(json.dumps(asdict(found)) + "\n")
                kept.flush()
                print(found, flush=True)
    args.page.parent.mkdir(parents=True, exist_ok=True)
    args.page.write_text(host_page([result for result in read(args.results) if result]))


if __name__ == "__main__":
    main()
