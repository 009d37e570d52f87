"""One cell of a table, from the artefacts of an experiment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

from qresafe.errors import SpecError
from qresafe.stages.arms import CONTROL
from qresafe.stages.compare import read_attack
from qresafe.stages.comparison import ArmResult, Share
from qresafe.stages.experiment import ARMS, Experiment
from qresafe.stages.measures import ATTACK
from qresafe.stages.reproduce.mt_bench import MtBench
from qresafe.stages.search.trial import arm_result

ATTACKED = "attack "  # a cell "Q0.attack top_p 0.7": attack success in that configuration
MT_BENCH = "mt_bench"


@dataclass(frozen=True)
class Figure:
    """A share in [0, 1], or a number.

    Attributes:
        value: The share or number.
        n: How many answers a share rests on; 0: it is counted, not sampled.
    """

    value: float
    n: int = 0


Results = Callable[[str], ArmResult]  # of an arm by its label, read once


def figures(
    experiment: Experiment, cells: Sequence[str], mt_bench: MtBench | None = None
) -> dict[str, Figure]:
    """Measure a row's cells; what they need is computed, what is finished is reused.

    Args:
        experiment: Of the row.
        cells: "Q0.attack_success" (an arm and a measure of `measures.MEASURES`), "Q0.attack top_p
            0.7" (attack success under one decoding configuration), "codes_changed" (a share of
            the codes), "hours" (of training the patch, times the devices), or "Q.mt_bench".
        mt_bench: What grades MT-Bench.

    Returns:
        Cell -> its figure, without those that the experiment cannot have: of a control that there
        is not, or of MT-Bench where nothing grades it.

    Raises:
        SpecError: A cell is none of these.
    """
    results = cache(partial(arm_result, experiment))
    found = {cell: _figure(experiment, cell, results, mt_bench) for cell in cells}
    return {cell: one for cell, one in found.items() if one}


def _figure(
    experiment: Experiment, cell: str, results: Results, mt_bench: MtBench | None
) -> Figure | None:
    if cell == "hours":
        spec, counts = experiment.spec, experiment.patched.manifest.counts
        devices = 1 if spec.patch.is_baseline else max(spec.resources.training.workers, 1)
        return Figure(counts["seconds"] * devices / 3600)
    if cell == "codes_changed":
        return Figure(experiment.exported.manifest.counts["fraction_changed"])
    arm, _, measure = cell.partition(".")
    if arm not in ARMS or not measure:
        raise SpecError(f"no cell {cell!r}", remedy="write e.g. Q0.attack_success")
    if arm == CONTROL and arm not in experiment.arms:
        return None
    if measure == MT_BENCH:
        rating = mt_bench.grade(experiment, arm) if mt_bench else None
        return None if rating is None else Figure(rating)
    if measure.startswith(ATTACKED):
        return _under_attack(experiment, arm, measure.removeprefix(ATTACKED))
    found = results(arm).measures.get(measure)
    return _of(found) if found else None


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
