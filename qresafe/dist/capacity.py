"""The GPUs that an experiment would find, and whether it fits into them."""

from __future__ import annotations

import os
from pathlib import Path

from qresafe.errors import ModelError
from qresafe.planning.fitting import require_fit
from qresafe.planning.hardware import (
    GIB,
    Cluster,
    Hardware,
    cpu_cluster,
    gpu_cluster,
    hardware,
    nearest_kind,
)
from qresafe.planning.plan import make_plan
from qresafe.planning.shapes import shape_of
from qresafe.specs import ExperimentSpec, ResourcesSpec

USUAL = "A100-80"  # what is planned for where there is no GPU to look at


def require_room(spec: ExperimentSpec, model: str, *, connected: bool) -> None:
    """Refuse an experiment that cannot fit into the GPUs, or the memory, that there are.

    Called before Ray starts, where this machine is what there is, and again for a cluster when
    its nodes are there.
    Where nothing is known of the devices, or of the model's shape, nothing is refused.

    Args:
        spec: The resolved experiment.
        model: W's folder on this machine.
        connected: Whether this process has joined the cluster.

    Raises:
        ResourceError: A stage needs more memory than there is; the remedy says what would fit.
    """
    resources = spec.resources
    elsewhere = bool(resources.workers and (resources.address or os.environ.get("RAY_ADDRESS")))
    if not resources.check_memory or elsewhere != connected:
        return
    cluster = ray_gpus(resources) if connected else _here(resources)
    if cluster is None:
        return
    try:
        shape = shape_of(spec.model.model_copy(update={"path": model}))
    except ModelError:  # an architecture whose config has other keys: `qresafe plan` says which
        return
    require_fit(spec, make_plan(spec, shape, cluster))


def found_cluster(resources: ResourcesSpec, known: Hardware | None = None) -> Cluster:
    """Return this machine as a cluster: its GPUs if the experiment wants any, else its CPUs.

    Without a GPU here, an experiment for GPUs is planned for as many A100-80.
    """
    known = known or hardware()
    count = _devices(resources)
    text = f"{count}x{USUAL} (no GPU here)"
    return _here(resources, known) or gpu_cluster(USUAL, count, known, text)


def _here(resources: ResourcesSpec, known: Hardware | None = None) -> Cluster | None:
    """Return what this machine gives an experiment; None: it wants GPUs, and there is none."""
    count = _devices(resources)
    if not resources.gpus_per_worker:
        return cpu_cluster(count, machine_memory(), resources.cpus_per_worker)
    import torch

    if not torch.cuda.is_available():
        return None
    seen = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    smallest = min(seen, key=lambda each: each.total_memory)
    known = known or hardware()
    kind = nearest_kind(smallest.name, smallest.total_memory, known) or USUAL
    memory = smallest.total_memory * min(1.0, resources.gpus_per_worker)
    return gpu_cluster(kind, count, known, f"{count}x{smallest.name}", memory)


def ray_gpus(resources: ResourcesSpec) -> Cluster | None:
    """Return the joined cluster's GPUs; None: it has none of a kind that we know."""
    import ray

    from qresafe.dist.gpus import kinds_in

    if not resources.gpus_per_worker:
        return None
    kinds = kinds_in([n for n in ray.nodes() if n["Alive"] and n["Resources"].get("GPU")])
    names = [kind for kind in kinds if kind]
    if not names or None in kinds:
        return None
    known = hardware()
    kind = min(names, key=lambda each: known.gpus[each].memory_gib)
    memory = known.gpus[kind].memory_gib * GIB * min(1.0, resources.gpus_per_worker)
    count = _devices(resources)
    return gpu_cluster(kind, count, known, f"{count}x{kind} of the Ray cluster", memory)


def _devices(resources: ResourcesSpec) -> int:
    """Return how many devices an experiment computes on: of several GPUs, each is one."""
    return max(1, resources.workers) * max(1, int(resources.gpus_per_worker))


def machine_memory() -> float:
    """Return the memory of this machine or, where that is less, its container's limit, bytes."""
    import psutil

    total = psutil.virtual_memory().total
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return float(min(total, int(Path(limit).read_text())))
        except (OSError, ValueError):  # no such cgroup, or "max"
            continue
    return float(total)
