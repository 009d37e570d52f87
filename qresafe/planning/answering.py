"""How a cluster's devices are shared out among models that answer."""

from __future__ import annotations

from qresafe.planning.hardware import Cluster
from qresafe.specs import ExperimentSpec


def gpus_of(spec: ExperimentSpec, cluster: Cluster) -> int:
    """Return over how many of a cluster's devices a model that answers is spread."""
    if cluster.device == "cpu":
        return 1
    return min(cluster.count, max(1, int(spec.resources.gpus_per_worker)))


def teachers_of(spec: ExperimentSpec, workers: int) -> int:
    """Return how many of `workers` answer for W while the others do for Q0; 0: not at once."""
    resources = spec.resources
    if not resources.teacher_workers or workers < 2:
        return 0
    share = resources.teacher_workers / resources.workers
    return min(workers - 1, max(1, round(share * workers)))
