"""What every host of a cluster must find: the run's storage, and models that lie in folders."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from upath import UPath

from qresafe.artifacts import is_local, output_errors
from qresafe.errors import ModelError, ResourceError

SECONDS = 120.0  # for a worker process to start on a host


def check_hosts(storage: UPath, models: Sequence[Path]) -> None:
    """See that every other host finds what this one has, before hours of work on them.

    Asks the hosts that the cluster has now; of one that joins later, its workers tell.

    Args:
        storage: The run's folder; a URL is the same everywhere.
        models: Folders that workers will load from.

    Raises:
        ResourceError: A host does not see what this one writes into the storage.
        ModelError: A host has no such folder.
    """
    here = ray.get_runtime_context().get_node_id()
    others = [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeID"] != here]
    if not others:
        return
    folders = [str(path) for path in models]
    if not is_local(storage):
        _ask(others, folders, None)
        return
    folder = Path(str(storage)).absolute()
    probe = folder / f".hosts-probe-{os.getpid()}"
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
    try:
        _ask(others, folders, str(probe))
    finally:
        probe.unlink(missing_ok=True)


def _ask(nodes: Sequence[str], models: list[str], probe: str | None) -> None:
    wanted = [*models, *([probe] if probe else [])]
    asked = [_on(node).remote(wanted) for node in nodes]
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=SECONDS)
    for answer in answered:
        try:
            host, missing = ray.get(answer)
        except ray.exceptions.RayError:  # it left the cluster meanwhile
            continue
        if probe in missing:
            what = f"host {host} does not see what is written here"
            where = str(Path(str(probe)).parent)
            remedy = "give a --storage that all hosts share: a network folder, or s3://bucket/path"
            raise ResourceError(what, where=where, remedy=remedy)
        if missing:
            what = f"host {host} has no folder {missing[0]!r}"
            remedy = "put the model where all hosts find it: a network folder, s3://, or a hub id"
            raise ModelError(what, where="model.path", remedy=remedy)


def _on(node: str) -> Any:
    placed = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(_missing).options(num_cpus=0, scheduling_strategy=placed)


def _missing(paths: list[str]) -> tuple[str, list[str]]:
    """Run on a host: its name and address, and which of the paths it lacks."""
    host = f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"
    return host, [path for path in paths if not os.path.exists(path)]
