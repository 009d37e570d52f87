"""What every host of a cluster must find: the run's storage, and models that lie in folders."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from upath import UPath

from qresafe.artifacts import client_errors, is_local, output_errors, write_text
from qresafe.errors import ModelError, ResourceError
from qresafe.integrity import tell

SECONDS = 120.0  # for a worker process to start on a host


def check_hosts(storage: UPath, models: Sequence[Path]) -> None:
    """See that every other host finds what this one has, before hours of work on them.

    Asks the hosts that the cluster has now; of one that joins later, its workers tell. One that
    does not answer in `SECONDS` is named, and no mistake.

    Args:
        storage: The run's folder. A URL is asked for too: a host may lack its keys or its address.
        models: Folders that workers will load from.

    Raises:
        ResourceError: A host does not see what this one writes into the storage.
        ModelError: A host has no such folder.
    """
    here = ray.get_runtime_context().get_node_id()
    alive = {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"]}
    others = {node: address for node, address in alive.items() if node != here}
    if not others:
        return
    folder = UPath(Path(str(storage)).absolute()) if is_local(storage) else storage
    probe = folder / f".hosts-probe-{os.getpid()}"
    with output_errors(folder), client_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(probe, "")
    try:
        _ask(others, [UPath(path) for path in models], probe)
    finally:
        with suppress(Exception):  # it must not hide what was found
            probe.unlink(missing_ok=True)


def _ask(nodes: Mapping[str, str], models: Sequence[UPath], probe: UPath) -> None:
    asked = {_on(node).remote([*models, probe]): address for node, address in nodes.items()}
    answered, waiting = ray.wait(list(asked), num_returns=len(asked), timeout=SECONDS)
    for answer in answered:
        try:
            host, missing = ray.get(answer)
        except ray.exceptions.RayError:  # it left the cluster meanwhile
            continue
        if str(probe) in missing:
            what = f"host {host} does not see what is written here"
            remedy = "give a --storage that all hosts share: a network folder, or s3://bucket/path"
            if not is_local(probe):
                remedy += ", and every host its keys and address"
            raise ResourceError(what, where=str(probe.parent), remedy=remedy)
        if missing:
            what = f"host {host} has no folder {missing[0]!r}"
            remedy = "put the model where all hosts find it: a network folder, s3://, or a hub id"
            raise ModelError(what, where="model.path", remedy=remedy)
    if waiting:
        silent = ", ".join(asked[each] for each in waiting)
        tell(f"not known to see the storage, as they did not answer in {SECONDS:.0f} s: {silent}")


def _on(node: str) -> Any:
    placed = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(_missing).options(num_cpus=0, scheduling_strategy=placed)


def _missing(paths: list[UPath]) -> tuple[str, list[str]]:
    """Run on a host: its name and address, and which of the paths it lacks."""
    host = f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"
    return host, [str(path) for path in paths if not _sees(path)]


def _sees(path: UPath) -> bool:
    with suppress(Exception):  # such as a client without keys
        return bool(path.exists())
    return False
