"""`ray up`, `ray submit` and `ray down` with clusters/local.yaml, on hosts that each run an sshd.

The hosts are network namespaces with process ids, a home and a temporary folder of their own. The
environment that the setup would install is there already: this machine has no package index.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.namespaces import Hosts, needs_hosts
from tests.heads import RAY, ROOT

SSHD = "/usr/sbin/sshd"
pytestmark = [
    pytest.mark.ray,
    pytest.mark.long,
    pytest.mark.timeout(900),
    needs_hosts(),
    pytest.mark.skipif(
        not (Path(SSHD).exists() and shutil.which("rsync")), reason="needs sshd and rsync"
    ),
]
WAIT = 120.0

# Sees three nodes, and computes on each of them.
SCRIPT = """
import time, ray
ray.init(address="auto", log_to_driver=False)
deadline = time.monotonic() + {wait}
while len(ray.nodes()) < 3 and time.monotonic() < deadline:
    time.sleep(1)
where = ray.remote(num_cpus=0)(lambda: ray.util.get_node_ip_address())
ips = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
asked = [where.options(resources={{f"node:{{ip}}": 0.01}}).remote() for ip in ips]
print("computed on", *sorted(ray.get(asked)))
"""


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Three hosts that root logs in to with one key."""
    with Hosts(3) as made:
        shared = made.folder
        for name in ("login", "hostkey"):
            key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(shared / name)]
            subprocess.run(key, check=True)
        (shared / "passwd").write_text(f"{_root(made)}\n{_others()}")
        for host, ip in enumerate(made.ips):
            _serve(made, host, ip)
        yield made


def _root(hosts: Hosts) -> str:
    return f"root:x:0:0:root:{hosts.own}/home:/bin/bash"


def _others() -> str:
    lines = Path("/etc/passwd").read_text().splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("root:"))


def _serve(hosts: Hosts, host: int, ip: str) -> None:
    """Start a host's sshd, with a home that has Ubuntu's .bashrc and what the setup would make."""
    home = hosts.behind(host) / "home"
    home.mkdir()
    (home / ".bashrc").write_text("# ~/.bashrc: executed by bash(1) for non-login shells.\n")
    (home / "qresafe-env").symlink_to(sys.prefix)
    config = hosts.folder / f"sshd{host}"
    config.write_text(
        f"ListenAddress {ip}\nHostKey {hosts.folder}/hostkey\nPidFile none\nUsePAM no\n"
        f"AuthorizedKeysFile {hosts.folder}/login.pub\nStrictModes no\nPermitRootLogin yes\n"
        f"SetEnv RAY_TMPDIR={hosts.own}/ray\n"
    )
    start = f"mount --bind {hosts.folder}/passwd /etc/passwd && mkdir -p /run/sshd {hosts.own}/ray"
    alone = ["unshare", "--pid", "--fork", "--mount-proc"]  # `ray stop` ends what it sees
    served = [*alone, "sh", "-c", f"{start} && exec {SSHD} -D -e -f {config}"]
    hosts.popen(host, served, stderr=subprocess.DEVNULL)


def filled_in(hosts: Hosts) -> Path:
    """Write clusters/local.yaml with what it says to fill in, and no package to install."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "clusters" / "local.yaml").read_text())
    config["provider"] |= {"head_ip": hosts.ips[0], "worker_ips": hosts.ips[1:]}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(hosts.folder / "login")}
    config["file_mounts"] = {
        there: str(ROOT / here) if "lock" in here else here
        for there, here in config["file_mounts"].items()
    }
    kept = [command for command in config["setup_commands"] if "pip" not in command]
    config["setup_commands"] = [command for command in kept if "uv venv" not in command]
    assert len(config["setup_commands"]) == 2
    path = hosts.folder / "local.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def ray(hosts: Hosts, *arguments: str) -> str:
    """Run one of Ray's cluster commands from outside, and return what it printed."""
    ended = subprocess.run(
        [RAY, *arguments], env=hosts.env, capture_output=True, text=True, timeout=400
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def raylets(hosts: Hosts) -> list[int]:
    """Return how many raylets each host runs."""
    return [
        sum(process.name() == "raylet" for process in hosts.processes(host)) for host in range(3)
    ]


def test_up_submit_and_down(hosts: Hosts) -> None:
    config, script = str(filled_in(hosts)), hosts.folder / "nodes.py"
    script.write_text(SCRIPT.format(wait=WAIT))
    began = time.monotonic()
    ray(hosts, "up", "--yes", "--no-config-cache", config)
    up = time.monotonic()
    told = ray(hosts, "submit", config, str(script))
    assert f"computed on {' '.join(sorted(hosts.ips))}" in told
    assert raylets(hosts) == [1, 1, 1]
    submitted = time.monotonic()
    ray(hosts, "down", "--yes", config)
    down = time.monotonic()
    assert raylets(hosts)[0] == 0
    # Which workers run is written on the head alone; without it they end by themselves.
    while any(raylets(hosts)) and time.monotonic() < down + WAIT:
        time.sleep(1)
    assert raylets(hosts) == [0, 0, 0]
    took = {"up": up - began, "submit": submitted - up, "down": down - submitted}
    took["the last worker's end"] = time.monotonic() - down
    print({what: round(seconds) for what, seconds in took.items()})  # shown with -s
