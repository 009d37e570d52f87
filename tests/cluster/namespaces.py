"""Several hosts on one machine: network namespaces with their own IPs, links and Ray nodes.

Each host is a network namespace of Linux, joined to the others by a veth pair and a bridge. It
also has a host name and a folder of its own, `Hosts.own`: the same path on every host, with other
files behind it, as /tmp is on real machines. All else of the file system is common to them, as a
shared folder is. This process stands outside, at `Hosts.outside`, where a server that it runs
reaches every host.

    with Hosts(3) as hosts:
        hosts.start_head(cpus=0)
        hosts.start_worker(1)
        hosts.start_worker(2, cpus=2, resources={"disk": 1})
        hosts.run(0, [sys.executable, "driver.py", hosts.address], check=True)
        hosts.cut(2)          # the network's fault: nothing dies, nothing gets through
        hosts.restore(2)
        hosts.kill(1)         # the power's fault: every process of the host gets SIGKILL

Needs root and iproute2; `needs_hosts` is the mark that skips a test where they are missing.
Users of different processes do not meet: each takes a bridge name and a subnet that are free.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.heads import RAY, clean_environment

SLOTS = 256  # subnets 10.77.0.0/24 to 10.77.255.0/24
LINK = "e0"  # a host's only network interface but lo
PORT = 6379
TRIES = 3  # Ray gives a node half a minute to start, which a busy machine can take
STORE_BYTES = 100_000_000
OWNER = "qresafe hosts of process "

Env = Mapping[str, str] | None


class Hosts:
    """A context manager: `count` hosts, numbered from 0, gone without a trace when it ends.

    Attributes:
        ips: Each host's address.
        outside: This process's address, as the hosts see it.
        address: Where a Ray driver on a host finds the cluster, once a head was started.
        folder: A short path, for what all hosts and this process share.
        own: A path behind which each host has files of its own; `behind(i)` shows them here.
        env: What every process on a host gets, with the token of this cluster.
    """

    def __init__(self, count: int) -> None:
        slot = _claim()
        self._name, self._count = _bridge(slot), count
        self.folder = _folder(self._name)
        self.folder.mkdir()
        self.own = self.folder / "own"
        self.ips = [f"10.77.{slot}.{index + 1}" for index in range(count)]
        self.outside = f"10.77.{slot}.254"
        self.address = f"{self.ips[0]}:{PORT}"
        self.env = clean_environment(self.folder) | {"GLOO_SOCKET_IFNAME": LINK}

    def __enter__(self) -> Hosts:
        try:
            self.own.mkdir()
            names = [f"{ip} {self._host(index)}\n" for index, ip in enumerate(self.ips)]
            (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(names))
            _ip("addr", "add", f"{self.outside}/24", "dev", self._name)
            _ip("link", "set", self._name, "up")
            for index in range(self._count):
                self._join(index)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        _remove(self._name)

    def command(self, host: int, argv: Sequence[str]) -> list[str]:
        """Return what any process of root's runs to have `argv` run on a host."""
        setup = 'hostname "$0" && mount --bind "$1" /etc/hosts && mount --bind "$2" "$3"'
        mounts = [str(self.folder / "hosts"), str(self.behind(host)), str(self.own)]
        name = self._host(host)
        alone = ["ip", "netns", "exec", name, "unshare", "--uts"]  # ip makes a mount namespace too
        return [*alone, "sh", "-c", f'{setup} && shift 3 && exec "$@"', name, *mounts, *argv]

    def run(
        self,
        host: int,
        argv: Sequence[str],
        *,
        env: Env = None,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host and return what it printed.

        Args:
            host: Its number.
            argv: The command.
            env: Added to the hosts' own environment.
            options: Of `subprocess.run`.
        """
        options = {"capture_output": True, "text": True, "timeout": 600} | options
        return subprocess.run(self.command(host, argv), env=self.env | dict(env or {}), **options)

    def popen(
        self,
        host: int,
        argv: Sequence[str],
        *,
        env: Env = None,
        **options: Any,
    ) -> subprocess.Popen[str]:
        """Start a command on a host; the process returned is the command itself."""
        return subprocess.Popen(
            self.command(host, argv), env=self.env | dict(env or {}), text=True, **options
        )

    def start_head(self, *, cpus: int = 1, options: Sequence[str] = (), env: Env = None) -> str:
        """Start the head on host 0, without a dashboard, and return its address.

        Args:
            cpus: How many the head offers to tasks.
            options: More options of `ray start`.
            env: Added to the hosts' own environment.
        """
        head = ["--head", f"--port={PORT}", "--disable-usage-stats"]
        if not any(option.startswith("--include-dashboard") for option in options):
            head.append("--include-dashboard=false")
        self._start(0, cpus, [*head, *options], env)
        return self.address

    def start_worker(
        self,
        host: int,
        *,
        cpus: int = 1,
        resources: Mapping[str, float] | None = None,
        options: Sequence[str] = (),
        env: Env = None,
    ) -> None:
        """Start a worker node on a host; it has joined when this returns."""
        worker = [f"--address={self.address}", f"--resources={json.dumps(dict(resources or {}))}"]
        self._start(host, cpus, [*worker, *options], env)

    def processes(self, host: int) -> list[psutil.Process]:
        """Return the host's processes."""
        return _processes(self._host(host))

    def kill(self, host: int) -> None:
        """End every process of a host by SIGKILL, as a power cut does."""
        _kill(self._host(host))

    def cut(self, host: int) -> None:
        """Cut a host off the network; its processes live on."""
        _ip("link", "set", self._veth(host), "down")

    def restore(self, host: int) -> None:
        """Join a host that was cut off to the network again."""
        _ip("link", "set", self._veth(host), "up")

    def behind(self, host: int) -> Path:
        """Return where this process finds the files that a host has under `own`."""
        return self.folder / f"host{host}"

    def _start(self, host: int, cpus: int, options: Sequence[str], env: Env) -> None:
        command = [RAY, "start", f"--node-ip-address={self.ips[host]}", f"--num-cpus={cpus}"]
        command += [f"--temp-dir={self.own}/ray", f"--object-store-memory={STORE_BYTES}", *options]
        for _ in range(TRIES):
            started = self.run(host, command, env=env, cwd=self.folder, timeout=120)
            if started.returncode == 0:
                return
            self.kill(host)
        raise RuntimeError(f"ray start on host {host}: {started.stdout}{started.stderr}")

    def _join(self, host: int) -> None:
        self.behind(host).mkdir()
        name, veth = self._host(host), self._veth(host)
        _ip("netns", "add", name)
        _ip("link", "add", veth, "type", "veth", "peer", "name", LINK, "netns", name)
        _ip("link", "set", veth, "master", self._name)
        _ip("link", "set", veth, "up")
        _ip("-n", name, "addr", "add", f"{self.ips[host]}/24", "dev", LINK)
        _ip("-n", name, "link", "set", LINK, "up")
        _ip("-n", name, "link", "set", "lo", "up")

    def _host(self, host: int) -> str:
        return f"{self._name}-{host}"

    def _veth(self, host: int) -> str:
        return f"{self._name}v{host}"


@cache
def unavailable() -> str | None:
    """Return why this machine cannot make hosts, or None."""
    if os.geteuid() != 0:
        return "several hosts on one machine need root"
    if not shutil.which("ip"):
        return "several hosts on one machine need iproute2's `ip`"
    try:
        _remove(_bridge(_claim()))
    except (RuntimeError, OSError) as error:
        return f"this machine makes no network bridges ({error})"
    return None


def needs_hosts() -> pytest.MarkDecorator:
    """Return the mark that skips where hosts cannot be made."""
    return pytest.mark.skipif(unavailable() is not None, reason=unavailable() or "")


def _claim() -> int:
    """Return a slot that is ours: a bridge of its name is made, which one process only can."""
    _sweep()
    for tried in range(SLOTS):
        slot = (os.getpid() + tried) % SLOTS
        made = _ip("link", "add", _bridge(slot), "type", "bridge", check=False)
        if made.returncode == 0:
            _ip("link", "set", _bridge(slot), "alias", f"{OWNER}{os.getpid()}")
            return slot
        if "exists" not in made.stderr:
            raise RuntimeError(made.stderr.strip())
    raise RuntimeError(f"all {SLOTS} subnets are taken")


def _sweep() -> None:
    """Remove the hosts of processes that died before they could."""
    for link in json.loads(_ip("-json", "link", "show", "type", "bridge").stdout or "[]"):
        owner = link.get("ifalias", "")
        if owner.startswith(OWNER) and not psutil.pid_exists(int(owner.removeprefix(OWNER))):
            _remove(link["ifname"])


def _remove(bridge: str) -> None:
    """End all processes of a bridge's hosts, and remove the hosts and the bridge."""
    names = json.loads(_ip("-json", "netns", "list").stdout or "[]")
    for name in [each["name"] for each in names if each["name"].startswith(f"{bridge}-")]:
        _kill(name)
        # By itself: with its namespace the kernel would take it some time later.
        _ip("link", "del", name.replace("-", "v"), check=False)
        _ip("netns", "del", name, check=False)
    shutil.rmtree(_folder(bridge), ignore_errors=True)
    _ip("link", "del", bridge, check=False)  # last: others may take the name from now on


def _processes(name: str) -> list[psutil.Process]:
    found = []
    for pid in _ip("netns", "pids", name, check=False).stdout.split():
        with suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(int(pid)))
    return found


def _kill(name: str) -> None:
    """End all processes of a host, those included that others start meanwhile."""
    deadline = time.monotonic() + 30
    while alive := _processes(name):  # not psutil's wait: it takes our children's exit codes
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes of {name} do not end: {alive}")
        time.sleep(0.02)


def _bridge(slot: int) -> str:
    return f"qhosts{slot}"


def _folder(bridge: str) -> Path:
    return Path("/tmp", bridge)  # short, for the names of Ray's sockets


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done
