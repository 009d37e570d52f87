"""The winner once more, over seeds, on validation and on the untouched test split."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, TypeAdapter
from upath import UPath

from qresafe.artifacts import write_text
from qresafe.progress import Progress
from qresafe.search_space import Params, with_params
from qresafe.search_spec import Search
from qresafe.stages.arms import Q0, Q, W
from qresafe.stages.experiment import Experiment
from qresafe.stages.runtime import Runtime
from qresafe.stages.search.metrics import Figures, measured
from qresafe.stages.search.trial import arm_result
from qresafe.stages.seeds import with_seed

DEFAULT, WINNER = "default", "winner"
SPLITS = ("validation", "test")


class Confirmed(BaseModel):
    """One model's figures with one seed on one split.

    Attributes:
        model: "W", "Q0", or Q of the experiment's own spec ("default") or of the winner.
        seed: Of all stages, and of the embedded W.
        split: "validation" or "test".
        metrics: By `metrics.METRICS`; W and Q0 have those that need no patch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    seed: int
    split: str
    metrics: dict[str, float]


_LIST = TypeAdapter(list[Confirmed])


def confirm(
    search: Search,
    winner: Params,
    runtime: Runtime,
    progress: Progress,
) -> list[Confirmed]:
    """Measure W, Q0, the default and the winner with every seed of `confirm`, on both splits.

    Args:
        search: The search.
        winner: What the winner sets; {}: it is the default, which is then measured once.
        runtime: Where stages run.
        progress: Shows them.
    """
    specs = {DEFAULT: {}, WINNER: winner} if winner else {DEFAULT: {}}
    found: list[Confirmed] = []
    for seed in search.spec.confirm:
        for split, base in zip(SPLITS, (search.validation, search.test), strict=True):
            for model, params in specs.items():
                spec = with_seed(with_params(base, params), seed, progress)
                made = _measure(Experiment(spec, runtime, progress), model, with_others=not params)
                found += [Confirmed(model=m, seed=seed, split=split, metrics=v) for m, v in made]
    return found


def _measure(
    experiment: Experiment, model: str, with_others: bool
) -> list[tuple[str, dict[str, float]]]:
    q0 = arm_result(experiment, Q0)
    patch, export = experiment.patched.manifest.counts, experiment.exported.manifest.counts
    found = []
    if with_others:
        w = arm_result(experiment, W)
        for arm, result in ((W, w), (Q0, q0)):
            unpatched = measured(Figures(result, q0, patch, export))
            kept = {k: v for k, v in unpatched.items() if k not in _OF_A_PATCH}
            found.append((arm, kept))
    figures = Figures(arm_result(experiment, Q), q0, patch, export)
    return [*found, (model, measured(figures))]


_OF_A_PATCH = {"codes_changed", "steps", "tokens", "seconds"}


def write_confirmation(path: UPath, found: Sequence[Confirmed]) -> None:
    """Write the figures as JSON."""
    write_text(path, _LIST.dump_json(list(found), indent=1).decode())


def read_confirmation(path: UPath) -> list[Confirmed]:
    """Read them; empty if there are none."""
    return _LIST.validate_json(path.read_text()) if path.exists() else []
