"""An autoscaler's cloud on one machine: its machines are `Hosts`, and a node is a raylet there.

Ray's own autoscaler runs beside the head and calls the provider, as it would call AWS. What was
started and stopped, and when, stands in a file that a test can read.

    with Hosts(3) as hosts:
        cloud = Cloud(hosts, cpus=1)
        cloud.start_head()
        ...
        cloud.events()
"""

from __future__ import annotations

import fcntl
import json
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from tests.cluster.namespaces import PORT, STORE_BYTES, Hosts, _kill, _processes
from tests.heads import RAY, ROOT

WORKER, HEAD = "worker", "head"
JOINED = "joined"  # our own tag
NETNS = 3  # the place of a namespace's name in `Hosts.command`
Node = dict[str, Any]


class Cloud:
    """Host 0 is a head without CPUs; all other hosts are machines that its autoscaler may start.

    Args:
        hosts: Entered already.
        cpus: Of each machine.
        idle_seconds: After which an idle node is stopped.
    """

    def __init__(self, hosts: Hosts, *, cpus: int = 1, idle_seconds: float = 6) -> None:
        self._hosts, self._cpus, self._idle = hosts, cpus, idle_seconds
        self._log = hosts.folder / "cloud.jsonl"

    def start_head(self) -> str:
        """Start the head with its autoscaler, and return its address."""
        path = self._hosts.folder / "cluster.yaml"
        path.write_text(json.dumps(self._configuration()))  # JSON is YAML
        env = {"PYTHONPATH": str(ROOT), "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        options = [f"--autoscaling-config={path}"]
        return self._hosts.start_head(cpus=0, options=options, env=env)

    def events(self) -> list[Node]:
        """Return what was started and stopped: dicts of at (Unix time), what, and host."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        return [json.loads(line) for line in lines]

    def alive(self) -> int:
        """Return how many nodes were started and not stopped."""
        what = [event["what"] for event in self.events()]
        return what.count("joined") - what.count("stopped") - what.count("lost")

    def _configuration(self) -> dict[str, Any]:
        machines = range(1, len(self._hosts.ips))
        types = {
            HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            WORKER: {
                "resources": {"CPU": self._cpus},
                "node_config": {},
                "min_workers": 0,
                "max_workers": len(machines),
            },
        }
        empty_lists = ["initialization_commands", "setup_commands", "cluster_synced_files"]
        empty_lists += ["rsync_exclude", "rsync_filter"]
        empty_lists += [f"{kind}_setup_commands" for kind in (HEAD, WORKER)]
        empty_lists += [f"{kind}_start_ray_commands" for kind in (HEAD, WORKER)]
        return {
            "cluster_name": "hosts",
            "max_workers": len(machines),
            "idle_timeout_minutes": self._idle / 60,
            "upscaling_speed": 10,
            "provider": {
                "type": "external",
                "module": f"{__name__}.HostsProvider",
                # Ray would log in to each node, and compare how often that fails.
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
                "foreground_node_launch": True,
                "worker_liveness_check": False,
                "log": str(self._log),
                "head": f"{self._hosts.ips[0]}:{PORT}",
                "temp": str(self._hosts.own / "ray"),
                "machines": {self._hosts.ips[i]: self._hosts.command(i, []) for i in machines},
            },
            "auth": {"ssh_user": "root"},
            "available_node_types": types,
            "head_node_type": HEAD,
            "file_mounts": {},
            "file_mounts_sync_continuously": False,
            **{name: [] for name in empty_lists},
        }


class HostsProvider(NodeProvider):  # type: ignore[misc]
    """What Ray's autoscaler calls; a node's identity is `<host's address>/<a number>`.

    Which nodes there are is kept in a file: Ray makes several providers, in several processes.
    """

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._machines: dict[str, list[str]] = provider_config["machines"]
        self._log = Path(provider_config["log"])
        self._table = self._log.with_suffix(".nodes")

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        return cluster_config

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        with self._nodes() as nodes:
            for name in [name for name, tags in nodes.items() if self._is_gone(name, tags)]:
                del nodes[name]
                self._note("lost", name)
            return [name for name, tags in nodes.items() if tag_filters.items() <= tags.items()]

    def is_running(self, node_id: str) -> bool:
        with self._nodes() as nodes:
            return node_id in nodes

    def is_terminated(self, node_id: str) -> bool:
        return not self.is_running(node_id)

    def node_tags(self, node_id: str) -> dict[str, str]:
        with self._nodes() as nodes:
            return dict(nodes.get(node_id, {}))

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        with self._nodes() as nodes:
            nodes[node_id].update(tags)

    def external_ip(self, node_id: str) -> str:
        return node_id.split("/")[0]

    def internal_ip(self, node_id: str) -> str:
        return self.external_ip(node_id)

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> None:
        taken = [node for _ in range(count) if (node := self._take(tags))]
        with ThreadPoolExecutor() as together:
            list(together.map(lambda node: self._start(node, tags, resources), taken))

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> None:
        raise NotImplementedError("the autoscaler always gives resources")

    def terminate_node(self, node_id: str) -> None:
        with self._nodes() as nodes:
            known = nodes.pop(node_id, None)
        if known is not None:
            _kill(self._machines[self.external_ip(node_id)][NETNS])
            self._note("stopped", node_id)

    def terminate_nodes(self, node_ids: Sequence[str]) -> None:
        for node_id in node_ids:
            self.terminate_node(node_id)

    def _take(self, tags: dict[str, str]) -> str | None:
        """Note a new node on a machine that has none, and return its identity."""
        with self._nodes() as nodes:
            used = {name.split("/")[0] for name in nodes}
            free = [address for address in self._machines if address not in used]
            if not free:
                return None
            node_id = f"{free[0]}/{uuid.uuid4().hex[:8]}"
            nodes[node_id] = {**tags, TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE}
        self._note("asked", node_id)
        return node_id

    def _start(self, node_id: str, tags: dict[str, str], resources: dict[str, float]) -> None:
        config, address = self.provider_config, self.external_ip(node_id)
        command = [RAY, "start", f"--address={config['head']}", f"--node-ip-address={address}"]
        command += [f"--num-cpus={resources['CPU']:g}", f"--temp-dir={config['temp']}"]
        command += [f"--object-store-memory={STORE_BYTES}"]
        identity = {  # by which the autoscaler finds out that this node is the one it asked for
            "RAY_CLOUD_INSTANCE_ID": node_id,
            "RAY_NODE_TYPE_NAME": tags[TAG_RAY_USER_NODE_TYPE],
        }
        env = ["env", *(f"{name}={value}" for name, value in identity.items())]
        whole = [*self._machines[address], *env, *command]
        done = subprocess.run(whole, capture_output=True, text=True, timeout=120)
        self._note("joined" if done.returncode == 0 else f"failed: {done.stderr[-300:]}", node_id)
        with self._nodes() as nodes:
            nodes[node_id][JOINED] = "yes"

    def _is_gone(self, node_id: str, tags: dict[str, str]) -> bool:
        """Return whether a machine that had joined was taken away, as spot machines are."""
        machine = self._machines.get(self.external_ip(node_id))
        return machine is not None and JOINED in tags and not _processes(machine[NETNS])

    def _note(self, what: str, node_id: str) -> None:
        event = {"at": time.time(), "what": what, "host": self.external_ip(node_id)}
        with self._log.open("a") as file:
            file.write(json.dumps(event) + "\n")

    @contextmanager
    def _nodes(self) -> Iterator[dict[str, dict[str, str]]]:
        """Lock the table of nodes (identity -> tags); what the block changes is kept."""
        with self._table.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            nodes = json.loads(text) if text else {self._head(): _head_tags()}
            yield nodes
            if (changed := json.dumps(nodes)) != text:
                file.truncate(0)
                file.write(changed)

    def _head(self) -> str:
        return f"{self.provider_config['head'].split(':')[0]}/head"


def _head_tags() -> dict[str, str]:
    return {
        TAG_RAY_NODE_KIND: NODE_KIND_HEAD,
        TAG_RAY_USER_NODE_TYPE: HEAD,
        TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
    }
