"""The hosts themselves: own addresses and folders, links that can be cut, nothing left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.namespaces import Hosts, needs_hosts

pytestmark = needs_hosts()

LISTEN = """
import socket
server = socket.create_server(("", 7000))
print("ready", flush=True)
while True:
    server.accept()[0].sendall(b"here")
"""
ASK = """
import socket, sys
try:
    print(socket.create_connection((sys.argv[1], 7000), timeout=1).recv(4).decode())
except OSError:
    print("nothing")
"""


def test_a_cut_link_lets_nothing_through_until_it_is_restored() -> None:
    with Hosts(2) as hosts:
        server = hosts.popen(1, [sys.executable, "-c", LISTEN], stdout=subprocess.PIPE)
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"

        def ask() -> str:
            return hosts.run(0, [sys.executable, "-c", ASK, hosts.ips[1]]).stdout.strip()

        heard = [ask()]
        hosts.cut(1)
        heard.append(ask())
        hosts.restore(1)
        heard.append(ask())
        assert heard == ["here", "nothing", "here"]
        assert server.pid in [process.pid for process in hosts.processes(1)]
        hosts.kill(1)
        assert server.wait(10) == -9
        assert ask() == "nothing"


def test_hosts_have_names_and_share_every_folder_but_their_own() -> None:
    with Hosts(2) as hosts:
        names = [hosts.run(host, ["hostname"], check=True).stdout.strip() for host in (0, 1)]
        assert names[0] != names[1]
        assert hosts.run(0, ["getent", "hosts", names[1]]).stdout.split() == [
            hosts.ips[1],
            names[1],
        ]
        for path in (hosts.own / "a", hosts.folder / "b"):
            hosts.run(0, ["touch", str(path)], check=True)
        seen = hosts.run(1, ["ls", str(hosts.own), str(hosts.folder / "b")], check=True).stdout
        assert seen.split() == [str(hosts.folder / "b"), f"{hosts.own}:"]
        assert (hosts.behind(0) / "a").exists()


def test_two_users_do_not_meet_and_leave_nothing() -> None:
    with Hosts(1) as one, Hosts(1) as other:
        assert one.ips != other.ips
        # A process that has not entered its host yet is not among those killed with it: each
        # says that it is there first.
        script = ["sh", "-c", "echo ready; exec sleep 1000"]
        sleepers = [hosts.popen(0, script, stdout=subprocess.PIPE) for hosts in (one, other)]
        assert [sleeper.stdout and sleeper.stdout.readline() for sleeper in sleepers] == (
            ["ready\n"] * 2
        )
        names = [hosts.command(0, [])[3] for hosts in (one, other)]
    assert [sleeper.wait(10) for sleeper in sleepers] == [-9, -9]
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert not any(name in left for name in names)
    assert not one.folder.exists()


def test_what_a_killed_user_left_is_removed_by_the_next() -> None:
    code = "import os\nfrom tests.cluster.namespaces import Hosts\n"
    code += "print(Hosts(1).__enter__().command(0, [])[3], flush=True)\nos.kill(os.getpid(), 9)"
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    name = killed.stdout.strip()
    assert name, killed.stderr
    with Hosts(1):
        left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
        assert name not in left
        assert not Path("/tmp", name.removesuffix("-0")).exists()


@pytest.mark.long  # the hosts of long tests
@pytest.mark.ray
def test_hosts_are_nodes_of_one_ray_cluster() -> None:
    code = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False)\n"
    code += "print(*sorted(n['NodeManagerAddress'] for n in ray.nodes() if n['Alive']))"
    with Hosts(2) as hosts:
        hosts.start_head(cpus=0)
        hosts.start_worker(1, resources={"disk": 1})
        seen = hosts.run(0, [sys.executable, "-c", code, hosts.address])
        assert seen.stdout.split() == hosts.ips, seen.stderr
