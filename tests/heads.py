"""A Ray head of our own with token authentication, and jobs on it."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
RAY = str(Path(sys.executable).with_name("ray"))


@dataclass
class Cluster:
    """A head on ports of its own."""

    address: str
    folder: Path
    env: dict[str, str]

    def submit(
        self, *entry: str, options: Sequence[str] = (), **env: str
    ) -> subprocess.CompletedProcess[str]:
        upload = ["submit", "--working-dir", ".", *options]
        return self.job(*upload, "--", "python", "-m", *entry, **env)

    def job(self, command: str, *more: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [RAY, "job", command, "--address", self.address, *more],
            cwd=ROOT,
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=500,
        )


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Sockets of Ray need a short path, which pytest's tmp_path is not.
    folder = Path(tempfile.mkdtemp(prefix="qj", dir="/tmp"))
    gcs, dashboard, *rest = free_ports(7)
    env = clean_environment(folder)
    names = ["node-manager-port", "object-manager-port", "ray-client-server-port"]
    names += ["dashboard-agent-listen-port", "dashboard-agent-grpc-port"]
    ports = [f"--{name}={port}" for name, port in zip(names, rest, strict=True)]
    command = [RAY, "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={folder}/ray"]
    command += [f"--port={gcs}", f"--dashboard-port={dashboard}", "--include-dashboard=true"]
    command += [*ports, "--object-store-memory=200000000", "--disable-usage-stats"]
    with open(folder / "head.log", "w") as log:
        head = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=folder)
    try:
        wait_for_agent(rest[3], head, folder / "head.log")
        yield Cluster(f"http://127.0.0.1:{dashboard}", folder, env)
    finally:
        end_tree(head)
        shutil.rmtree(folder, ignore_errors=True)


def clean_environment(folder: Path) -> dict[str, str]:
    """Return an environment in which nothing points to another cluster."""
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_worker_niceness": "0",  # Ray's 15 starves its workers where anything else runs
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def free_ports(count: int) -> list[int]:
    """Return ports that nothing takes before they are used.

    They lie below those that the kernel gives to whoever asks for any, as other tests do
    meanwhile, and above those that Ray's workers take (10002 to 19999).
    """
    found: set[int] = set()
    while len(found) < count:
        port = 20000 + secrets.randbelow(12000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.add(port)
    return list(found)


def wait_for_agent(port: int, head: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the agent that runs jobs listens; `ray start` itself returns earlier."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert head.poll() is None, log.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    pytest.fail(f"no agent listens on {port}: {log.read_text()}")


def end_tree(head: subprocess.Popen[bytes]) -> None:
    """End the head and its children only: `ray stop` would end every cluster of this machine."""
    if head.poll() is not None:  # whoever waited for it tells why
        return
    family = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
    head.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=5)
    for process in alive:
        process.kill()
    head.wait(timeout=20)
