"""What a search can minimise: figures of a patched model, each from what stages have measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from qresafe.errors import SpecError, nearest
from qresafe.stages.comparison import ArmResult
from qresafe.stages.measures import BY_NAME, Measure, roles


@dataclass(frozen=True)
class Figures:
    """What is known of a finished trial.

    Attributes:
        q: The patched model, on the validation prompts.
        q0: The quantized model, on the same.
        patch: Counts of the patch stage.
        export: Counts of the export stage.
    """

    q: ArmResult
    q0: ArmResult
    patch: Mapping[str, Any]
    export: Mapping[str, Any]


@dataclass(frozen=True)
class Metric:
    """One figure; low is good.

    Attributes:
        name: Its name in a search's YAML and in trials.parquet.
        title: Its name for people.
        value: Computes it; None where it cannot be.
        measure: The measure of `stages.measures` that it needs.
        percent: Whether people read it in per cent.
    """

    name: str
    title: str
    value: Callable[[Figures], float | None]
    measure: Measure | None = None
    percent: bool = True


def _share(name: str) -> Callable[[Figures], float | None]:
    def value(found: Figures) -> float | None:
        share = found.q.measures.get(name)
        return None if share is None else share.share

    return value


def _incoherence(found: Figures) -> float | None:
    share = _share("coherence")(found)
    return None if share is None else 1.0 - share


def _utility_drop(found: Figures) -> float | None:
    before, after = (arm.measures.get("exact_match") for arm in (found.q0, found.q))
    if before is None or after is None or before.share is None or after.share is None:
        return None
    return before.share - after.share


def _perplexity_rise(found: Figures) -> float | None:
    before, after = found.q0.utility, found.q.utility
    if not (before and after and before.perplexity and after.perplexity):
        return None
    return after.perplexity / before.perplexity - 1.0


def _count(name: str) -> Callable[[Figures], float | None]:
    return lambda found: float(found.patch[name])


METRICS = (
    *(
        Metric(name, BY_NAME[name].title, _share(name), BY_NAME[name])
        for name in ("attack_success", "compliance", "over_refusal", "benign_refusal")
    ),
    Metric("incoherence", "incoherence", _incoherence, BY_NAME["coherence"]),
    Metric("utility_drop", "exact match lost", _utility_drop, BY_NAME["exact_match"]),
    Metric("perplexity_rise", "perplexity gained", _perplexity_rise, BY_NAME["exact_match"]),
    Metric("codes_changed", "codes changed", lambda f: float(f.export["fraction_changed"])),
    Metric("steps", "steps", _count("steps"), percent=False),
    Metric("tokens", "tokens trained on", _count("tokens"), percent=False),
    Metric("seconds", "seconds of training", _count("seconds"), percent=False),
)
METRICS_BY_NAME = {metric.name: metric for metric in METRICS}
TIMED = {"seconds"}  # differ from run to run


def measured(found: Figures) -> dict[str, float]:
    """Return every metric that can be computed."""
    values = {metric.name: metric.value(found) for metric in METRICS}
    return {name: value for name, value in values.items() if value is not None}


def check_metrics(names: Sequence[str], prompts: pa.Table, judges: Sequence[str]) -> None:
    """Refuse metrics that no stage of the experiment will produce.

    Args:
        names: Of objectives, constraints and the scheduler.
        prompts: The validation prompts.
        judges: Of the experiment.

    Raises:
        SpecError: A name is unknown, or its prompts, judge or reference answers are missing.
    """
    for name in names:
        if name not in METRICS_BY_NAME:
            remedy = nearest(name, METRICS_BY_NAME)
            raise SpecError(f"no stage produces the metric {name!r}", remedy=remedy)
        lacking = _lacking(METRICS_BY_NAME[name].measure, prompts, judges)
        if lacking:
            remedy = "add it to the experiment, or take the metric out"
            raise SpecError(f"the metric {name!r} needs {lacking}", remedy=remedy)


def _lacking(measure: Measure | None, prompts: pa.Table, judges: Sequence[str]) -> str:
    if measure is None:
        return ""
    rows = [r for r in prompts.to_pylist() if measure.axis in (None, r["axis"])]
    if not rows:
        return f"{measure.axis} prompts among the validation prompts"
    if measure.judge and measure.judge not in roles(list(judges)):
        return "judge keyword" if measure.judge == "attack" else "a judge besides keyword"
    if measure.judge is None and not any(row["target"] for row in rows):
        return "benign prompts with reference answers"
    return ""
