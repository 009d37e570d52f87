"""Which kind of GPU the nodes of a cluster have: Ray's "A100" stands for two sizes."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qresafe.planning.hardware import MIB, hardware, nearest_kind

PREFIX = "accelerator_type:"  # of the resources by which Ray names a node's GPUs
SECONDS = 60.0  # for a worker process to start on a node
ASK = ["nvidia-smi", "--query-gpu=memory.total,name", "--format=csv,noheader,nounits"]


def kinds_in(nodes: Sequence[Mapping[str, Any]]) -> set[str | None]:
    """Return our kinds of the GPUs of nodes, as `ray.nodes()` lists them.

    Where a name leaves the memory open, the node is asked. None: of a GPU that we do not know, or
    whose node does not say what it has; nothing is guessed.
    """
    found: set[str | None] = set()
    open_names: dict[str, str] = {}  # node -> its GPU's name
    for node in nodes:
        for name in (n.removeprefix(PREFIX) for n in node["Resources"] if n.startswith(PREFIX)):
            kinds = kinds_named(name)
            if len(kinds) > 1:
                open_names[node["NodeID"]] = name
            else:
                found.add(kinds[0] if kinds else None)
    return found | asked(open_names)


def kinds_named(accelerator: str) -> list[str]:
    """Return our kinds that Ray's name of an accelerator ("A100-40G", "A100", "L4") may mean."""
    family, _, size = accelerator.upper().partition("-")
    close = [kind for kind in hardware().gpus if kind.split("-")[0].upper() == family]
    exact = [kind for kind in close if size and kind.split("-")[1] == size.rstrip("GB")]
    return exact or close


def asked(nodes: Mapping[str, str]) -> set[str | None]:
    """Ask nodes what their GPUs are; None for one that does not say."""
    if not nodes:
        return set()
    answers = [_on(node).remote() for node in nodes]
    answered, waiting = ray.wait(answers, num_returns=len(answers), timeout=SECONDS)
    found: set[str | None] = {None} if waiting else set()
    for answer in answered:
        try:
            found |= set(ray.get(answer)) or {None}
        except ray.exceptions.RayError:  # it left the cluster meanwhile
            continue
    return found


def kinds_here() -> list[str | None]:
    """Return our kinds of this machine's GPUs, as nvidia-smi tells; empty if it does not."""
    try:
        told = subprocess.run(ASK, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    fields = [line.split(",", 1) for line in told.splitlines() if line.strip()]
    return [nearest_kind(name, float(memory) * MIB) for memory, name in fields]


def _on(node: str) -> Any:
    placed = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(kinds_here).options(num_cpus=0, scheduling_strategy=placed)
