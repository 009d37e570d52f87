"""What several experiments need, in a line each: for dry runs."""

from __future__ import annotations

from dataclasses import dataclass

from qresafe.planning.hardware import GIB, Cluster
from qresafe.planning.plan import make_plan
from qresafe.planning.shapes import shape_of
from qresafe.specs import ExperimentSpec


@dataclass(frozen=True)
class Need:
    """What one experiment needs; stages that it shares with others are counted in each.

    Attributes:
        device_hours: GPUs (or CPU processes) times hours.
        gib: Of the stage that needs most memory, per device.
        stage: That stage.
        cost: USD.
        fits: Whether every stage has room.
    """

    device_hours: float
    gib: float
    stage: str
    cost: float
    fits: bool


def need(spec: ExperimentSpec, cluster: Cluster, *, patched: bool = True) -> Need:
    """Return what an experiment needs on a cluster; nothing is loaded or downloaded.

    Args:
        spec: The resolved experiment.
        cluster: What it is to run on.
        patched: Whether it goes on to the patch, or only measures W and Q0.

    Raises:
        ModelError: The shape of its model is not known.
    """
    plan = make_plan(spec, shape_of(spec.model), cluster, patched=patched)
    peak = plan.peak
    return Need(plan.device_hours, peak.bytes / GIB, peak.name, plan.cost, not plan.misfits)
