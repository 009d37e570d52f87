"""What would make an experiment fit: settings first, then other or more GPUs."""

from __future__ import annotations

from collections.abc import Iterator

from qresafe.errors import ResourceError, SpecError
from qresafe.planning.answering import gpus_of
from qresafe.planning.hardware import GIB, Cluster, Hardware, gpu_cluster, hardware
from qresafe.planning.plan import Plan, StagePlan, make_plan
from qresafe.planning.shapes import ModelShape
from qresafe.quantize_specs import LlmQatSpec
from qresafe.specs import ExperimentSpec
from qresafe.variants import with_changes

GPUS = "resources.gpus_per_worker"
COUNTS = (1, 2, 4, 8, 16, 32, 64)


def require_fit(spec: ExperimentSpec, plan: Plan) -> None:
    """Refuse an experiment that needs more memory than there is.

    Raises:
        ResourceError: A stage does not fit; the remedy says what would.
    """
    if not plan.misfits:
        return
    worst = max(plan.misfits, key=lambda stage: stage.bytes)
    what = f"{worst.name} needs {_need(worst)}"
    remedy = what_would_fit(spec, plan.shape, plan.cluster) or "no change that we know would fit"
    raise ResourceError(what, where=f"the plan for {plan.cluster.text}", remedy=remedy)


def what_would_fit(
    spec: ExperimentSpec, shape: ModelShape, cluster: Cluster, known: Hardware | None = None
) -> str:
    """Return what would make all stages fit: `--set` options, GPUs, or both; "" if nothing.

    GPUs are named without an option: `qresafe run` takes those it finds, and has none for them.
    """
    ways = []
    changed, settings = _with_settings(spec, shape, cluster)
    if not make_plan(changed, shape, cluster).misfits:
        ways.append(" ".join(f"--set {key}={value}" for key, value in settings.items()))
    if larger := _larger(spec, shape, cluster, known or hardware()):
        ways.append(f"GPUs such as {larger}")
    elif not ways and (larger := _larger(changed, shape, cluster, known or hardware())):
        options = " ".join(f"--set {key}={value}" for key, value in settings.items())
        ways.append(f"GPUs such as {larger} with {options}")
    return f"would fit: {', or '.join(ways)}" if ways else ""


def _need(stage: StagePlan) -> str:
    if stage.bytes > stage.available:
        most = max(stage.parts, key=lambda part: stage.parts[part])
        return (
            f"{stage.bytes / GIB:.1f} GiB per device of {stage.available / GIB:.1f} "
            f"({most}: {stage.parts[most] / GIB:.1f})"
        )
    return f"{stage.host / GIB:.0f} GiB of host memory per GPU of {stage.host_available / GIB:.0f}"


def _with_settings(
    spec: ExperimentSpec, shape: ModelShape, cluster: Cluster
) -> tuple[ExperimentSpec, dict[str, object]]:
    """Return the spec with the fewest of our changes that make it fit (or with all that help)."""
    settings: dict[str, object] = {}
    for key, value in _settings(spec, shape, cluster):
        before = make_plan(spec, shape, cluster)
        if not before.misfits:
            break
        try:
            changed = _set(spec, key, value)
        except SpecError:  # it does not go with the others
            continue
        after = make_plan(changed, shape, cluster)
        if _excess(after) < _excess(before):
            spec, settings[key] = changed, value
    return spec, settings


def _settings(
    spec: ExperimentSpec, shape: ModelShape, cluster: Cluster
) -> Iterator[tuple[str, object]]:
    """Yield settings that take less memory, those that change no result first."""
    spreads = [(GPUS, each) for each in COUNTS if gpus_of(spec, cluster) < each <= cluster.count]
    spreads = spreads if cluster.device == "gpu" else []
    if shape.bytes * shape.parameters > cluster.memory:  # then no batch is small enough
        yield from spreads
    yield from _halved("evaluate.generate.batch_size", spec.evaluate.generate.batch_size)
    if spec.evaluate.attack:
        yield from _halved("evaluate.attack.batch_size", spec.evaluate.attack.batch_size)
    yield from _halved("pairs.batch_size", spec.pairs.batch_size)
    yield from spreads
    yield from _halved("patch.micro_batch_size", spec.patch.micro_batch_size)
    if isinstance(spec.quantize, LlmQatSpec) and not spec.quantize.gradient_checkpointing:
        yield "quantize.gradient_checkpointing", True
    if not spec.patch.gradient_checkpointing:
        yield "patch.gradient_checkpointing", True
    yield from (("patch.zero_stage", stage) for stage in (2, 3) if stage > spec.patch.zero_stage)
    if spec.patch.offload == "none":
        yield "patch.offload", "optimizer"
    if spec.patch.offload != "parameters":
        yield "patch.offload", "parameters"
    if isinstance(spec.quantize, LlmQatSpec) and spec.quantize.optimizer == "adamw":
        yield "quantize.optimizer", "adamw8bit"
    yield "control", False
    yield from _halved("patch.rank", spec.patch.rank)


def _halved(key: str, value: int) -> Iterator[tuple[str, object]]:
    while value > 1:
        value //= 2
        yield key, value


def _set(spec: ExperimentSpec, key: str, value: object) -> ExperimentSpec:
    changes: object = value
    for part in reversed(key.split(".")):
        changes = {part: changes}
    assert isinstance(changes, dict)
    return with_changes(spec, changes)


def _excess(plan: Plan) -> float:
    """Return by how much all stages together go beyond what there is."""
    return sum(
        max(0.0, stage.bytes - stage.available)
        + (max(0.0, stage.host - stage.host_available) if stage.host_available else 0.0)
        for stage in plan.stages
    )


def _larger(
    spec: ExperimentSpec, shape: ModelShape, cluster: Cluster, known: Hardware
) -> str | None:
    """Return the cheapest cluster (per hour) on which everything fits."""
    options = [
        gpu_cluster(kind, count, known)
        for kind in known.gpus
        for count in COUNTS
        if count * known.gpus[kind].price_per_hour > 0
    ]
    for option in sorted(options, key=lambda each: each.count * each.price):
        if option.text != cluster.text and not make_plan(spec, shape, option).misfits:
            return option.text
    return None
