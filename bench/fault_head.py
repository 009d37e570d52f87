"""A Ray head of our own for fault runs: started, lost and started again; never `ray stop`."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import psutil
import ray.util

START_SECONDS, STARTS = 300, 10
RAY = str(Path(sys.executable).with_name("ray"))
PORTS = ["port", "node-manager-port", "object-manager-port", "dashboard-agent-listen-port",
         "dashboard-agent-grpc-port", "runtime-env-agent-port", "metrics-export-port",
         "ray-client-server-port"]  # fmt: skip


class Cluster(Protocol):
    """What faults hit: `Head`, or hosts of this machine (bench/host_faults.py)."""

    def start(self) -> None:
        """Start what does not run, and wait until it takes drivers."""

    def environment(self) -> dict[str, str]:
        """Return what its drivers run with."""

    def processes(self, *titles: str) -> list[psutil.Process]:
        """Return its running processes whose title holds one of `titles`, by process id."""

    def popen(self, words: Sequence[str], log: BinaryIO) -> subprocess.Popen[Any]:
        """Start a driver on this cluster, with its output in `log`."""

    def end(self) -> None:
        """End it and all that it started."""


class Head:
    """One head on ports of its own, always at the same address.

    Args:
        folder: Short path (Unix sockets live below it) for Ray's files and logs.
        cpus: How many CPUs it offers.
    """

    def __init__(self, folder: Path, cpus: int = 2) -> None:
        self._folder, self._cpus = folder, cpus
        self._ports = free_ports(len(PORTS))
        self._process: subprocess.Popen[bytes] | None = None
        self.address = f"{ray.util.get_node_ip_address()}:{self._ports[0]}"
        self.starts = 0
        self._folder.mkdir(parents=True, exist_ok=True)
        self._token = self._folder / "token"
        self._token.write_text(secrets.token_hex(32))
        self._token.chmod(0o600)

    def environment(self) -> dict[str, str]:
        """Return what its drivers run with: nothing of it points to another cluster."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return kept | {
            "RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "token",  # as `ray start` has it by itself
            "RAY_AUTH_TOKEN_PATH": str(self._token),
            "RAY_worker_niceness": "0",
            "RAY_raylet_start_wait_time_s": str(START_SECONDS),
            "RAY_gcs_rpc_server_connect_timeout_s": "60",  # 5 is too short on a busy machine
            "OMP_NUM_THREADS": "1",  # equal bits need equal thread counts
            "HF_HUB_OFFLINE": "1",
        }

    def start(self) -> None:
        """Start it if it does not run, and wait until it takes drivers.

        On a busy machine a raylet gives up when its agent is not up in 15 seconds; then again.
        """
        for _ in range(STARTS):
            if self.alive() or self._started():
                return
        raise RuntimeError(f"no Ray head: {self._log().read_text()[-2000:]}")

    def _log(self) -> Path:
        return self._folder / "head.log"

    def _started(self) -> bool:
        self.end()
        self.starts += 1
        self._folder.mkdir(parents=True, exist_ok=True)
        command = [RAY, "start", "--head", "--block", f"--num-cpus={self._cpus}",
                   f"--temp-dir={self._folder}/ray", "--include-dashboard=false",
                   "--object-store-memory=200000000", "--disable-usage-stats",
                   *(f"--{n}={p}" for n, p in zip(PORTS, self._ports, strict=True))]  # fmt: skip
        environment = {k: v for k, v in self.environment().items() if k != "RAY_ADDRESS"}
        with open(self._log(), "wb") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            if b"Ray runtime started" in self._log().read_bytes():
                return True
            if any(is_dead(p) for p in family(self._process.pid) if p.name() == "raylet"):
                return False
            time.sleep(0.2)
        return False

    def alive(self) -> bool:
        """Return whether all that a head is made of runs."""
        if self._process is None or self._process.poll() is not None:
            return False
        return bool(self.processes("raylet")) and bool(self.processes("gcs_server"))

    def processes(self, *titles: str) -> list[psutil.Process]:
        """Return its running processes whose title holds one of `titles`, by process id."""
        if self._process is None:
            return []
        found = [p for p in family(self._process.pid) if any(t in title(p) for t in titles)]
        return sorted(found, key=lambda process: process.pid)

    def popen(self, words: Sequence[str], log: BinaryIO) -> subprocess.Popen[Any]:
        """Start a driver on this cluster, with its output in `log`."""
        return subprocess.Popen(words, stdout=log, stderr=log, env=self.environment())

    def end(self) -> None:
        """End it and all that it started."""
        if self._process is None:
            return
        doomed = family(self._process.pid)
        self._process.send_signal(signal.SIGTERM)
        end(doomed)
        self._process.wait()
        self._process = None


def family(parent: int) -> list[psutil.Process]:
    """Return a process's children and theirs; empty if it is gone."""
    try:
        return psutil.Process(parent).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def title(process: psutil.Process) -> str:
    """Return what a process calls itself; for a program, the name of its file."""
    with suppress(psutil.Error, IndexError):
        return Path(process.cmdline()[0]).name
    return ""


def is_dead(process: psutil.Process) -> bool:
    """Return whether a process has ended, waited for or not."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    return True


def end(processes: list[psutil.Process]) -> None:
    """Wait a little for processes to end, then kill those that have not."""
    for process in processes:
        with suppress(psutil.Error):
            process.send_signal(signal.SIGCONT)  # a stopped one cannot end
    for process in psutil.wait_procs(processes, timeout=5)[1]:
        with suppress(psutil.Error):
            process.kill()


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
