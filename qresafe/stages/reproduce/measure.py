"""One cell of a table, from the artefacts of an experiment."""

from __future__ import annotations

from dataclasses import dataclass

from qresafe.errors import SpecError
from qresafe.stages.arms import compare_arms
from qresafe.stages.columns import read_arm
from qresafe.stages.compare import read_attack
from qresafe.stages.comparison import Share
from qresafe.stages.experiment import ARMS, Experiment
from qresafe.stages.measures import ATTACK

ATTACKED = "attack "  # a cell "Q0.attack top_p 0.7": attack success in that configuration
OURS_LACKS = ("mt_bench", "alpaca_eval")  # what the paper measures with GPT-4


@dataclass(frozen=True)
class Figure:
    """A share (yes of n) or, where n is 0, a number.

    Attributes:
        value: The share in [0, 1], or the number.
        n: How many answers the share rests on.
    """

    value: float
    n: int = 0


def figure(experiment: Experiment, cell: str) -> Figure | None:
    """Measure one cell; what it needs is computed, what is finished is reused.

    Args:
        experiment: Of the cell's row.
        cell: "Q0.attack_success" (an arm and a measure of `measures.MEASURES`), "Q0.attack top_p
            0.7" (attack success under one decoding configuration), "codes_changed" (a share of
            the codes), or "hours" (of training the patch, times the devices).

    Returns:
        None where the experiment cannot have it: no control, or a measure of the paper alone.

    Raises:
        SpecError: The cell is none of these.
    """
    if cell == "hours":
        seconds = experiment.patched.manifest.counts["seconds"]
        return Figure(seconds * max(experiment.spec.resources.workers, 1) / 3600)
    if cell == "codes_changed":
        return Figure(experiment.exported.manifest.counts["fraction_changed"], 1)
    arm, _, measure = cell.partition(".")
    if arm not in ARMS or not measure:
        raise SpecError(f"no cell {cell!r}", remedy="write e.g. Q0.attack_success")
    if measure in OURS_LACKS or (arm == "control" and not has_control(experiment)):
        return None
    if measure.startswith(ATTACKED):
        return _under_attack(experiment, arm, measure.removeprefix(ATTACKED))
    read = read_arm(arm, experiment.completions(arm), experiment.verdicts(arm))
    found = compare_arms([read], []).arms[0].measures.get(measure)
    return _of(found) if found else None


def has_control(experiment: Experiment) -> bool:
    """Return whether the quantizer fine-tunes, so that there is a full-precision control."""
    return bool(experiment.quantized.manifest.counts["control"])


def _under_attack(experiment: Experiment, arm: str, configuration: str) -> Figure | None:
    result = read_attack(experiment.attacked(arm))
    of_attack = next(one for one in result.measures if one.measure == ATTACK.name)
    found = [cell.share for cell in of_attack.cells if cell.configuration == configuration]
    if not found:
        known = ", ".join(result.configurations)
        raise SpecError(f"no decoding configuration {configuration!r}", remedy=f"it has {known}")
    return _of(found[0])


def _of(share: Share) -> Figure | None:
    return None if share.share is None else Figure(share.share, share.n)
