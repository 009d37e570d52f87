"""An experiment's stages on a cluster: memory per device by part, time and cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from qresafe.planning import memory
from qresafe.planning.answering import gpus_of, teachers_of
from qresafe.planning.flipping import flips
from qresafe.planning.hardware import GIB, Cluster
from qresafe.planning.memory import WEIGHTS, Batch, Parts, Patching
from qresafe.planning.patching import code_bits, patching
from qresafe.planning.quantizing import quantizing
from qresafe.planning.shapes import ModelShape
from qresafe.planning.workload import Assumptions, Workload, assumptions, steps_of, workload
from qresafe.quantize_specs import Critical16Spec
from qresafe.specs import ExperimentSpec

SECONDS = 3600.0
HOST_COPIES = 2  # a checkpoint's decoded weights and the model that takes them up


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    Attributes:
        name: The stage, with the arm.
        parts: Peak memory of one device, bytes.
        host: Peak host memory of one process, bytes, where it is large.
        devices: How many it uses at a time.
        seconds: By the clock.
        measured: Whether docs/plan.md holds this memory model against measurements.
        available: Bytes of one device.
        beside: Whether it runs at the same time as the stage before, on other devices.
    """

    name: str
    parts: Parts
    devices: int
    seconds: float
    measured: bool
    available: float
    host: float = 0.0
    host_available: float = 0.0
    beside: bool = False

    @property
    def bytes(self) -> float:
        return memory.total(self.parts)

    @property
    def fits(self) -> bool:
        return self.bytes <= self.available and (
            not self.host_available or self.host <= self.host_available
        )

    @property
    def device_hours(self) -> float:
        return self.devices * self.seconds / SECONDS


@dataclass(frozen=True)
class Plan:
    """All stages of an experiment on a cluster."""

    shape: ModelShape
    cluster: Cluster
    stages: tuple[StagePlan, ...]

    @property
    def misfits(self) -> tuple[StagePlan, ...]:
        """The stages that need more than there is."""
        return tuple(stage for stage in self.stages if not stage.fits)

    @property
    def peak(self) -> StagePlan:
        """The stage that needs most memory."""
        return max(self.stages, key=lambda stage: stage.bytes)

    @property
    def device_hours(self) -> float:
        return sum(stage.device_hours for stage in self.stages)

    @property
    def seconds(self) -> float:
        before, whole = 0.0, 0.0
        for stage in self.stages:
            whole += max(0.0, stage.seconds - before) if stage.beside else stage.seconds
            before = stage.seconds
        return whole

    @property
    def cost(self) -> float:
        """USD, all devices being paid for from beginning to end."""
        return self.cluster.count * self.cluster.price * self.seconds / SECONDS

    def as_data(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "model": self.shape.name,
            "parameters": self.shape.parameters,
            "cluster": self.cluster.text,
            "fits": not self.misfits,
            "hours": self.seconds / SECONDS,
            "device_hours": self.device_hours,
            "cost_usd": self.cost,
            "stages": [_stage_data(stage) for stage in self.stages],
        }


def make_plan(
    spec: ExperimentSpec, shape: ModelShape, cluster: Cluster, *, patched: bool = True
) -> Plan:
    """Return the plan of an experiment; a pure function, nothing is loaded.

    Args:
        spec: The resolved experiment.
        shape: Of its model.
        cluster: What it is to run on.
        patched: Whether it goes on to the patch, or only measures W and Q0.
    """
    return Plan(shape, cluster, tuple(_Planner(spec, shape, cluster, patched).stages()))


class _Planner:
    def __init__(
        self, spec: ExperimentSpec, shape: ModelShape, cluster: Cluster, patched: bool
    ) -> None:
        self.spec, self.shape, self.cluster, self.patched = spec, shape, cluster, patched
        self.rows: Workload = workload(spec)
        self.known: Assumptions = assumptions()
        # That train, TRL on one; to answer, some may stand together.
        self.workers = 1 if spec.patch.is_baseline else cluster.count
        self.each = gpus_of(spec, cluster)
        self.answering = cluster.count // self.each
        self.teachers = teachers_of(spec, self.answering)
        self.low_bits = shape.bytes * shape.parameters  # as transformers decodes it
        if spec.quantize.method == "bnb":
            bits = 1.0 if spec.quantize.format == "int8" else 0.5 + 4 / 64
            self.low_bits = int(bits * shape.quantized + shape.bytes * shape.other)

    def stages(self) -> Iterator[StagePlan]:
        """Yield the stages in the order in which they run."""
        yield from self._quantize()
        if self.patched:
            yield from self._patching()
        arms = self.rows.arms - (0 if self.patched else 1 + self.spec.evaluate.adapter)
        spec = self.spec.evaluate.generate
        rows = self.rows.evaluation * spec.samples * arms
        name = f"generate {arms} arms, evaluation"
        yield self._generate(name, rows, spec.max_new_tokens, None, spec.batch_size)
        if attack := self.spec.evaluate.attack:
            tried = "W, Q0, Q" if self.patched else "W, Q0"
            rows = self.rows.harmful * self.rows.attacks * (3 if self.patched else 2)
            size = attack.batch_size
            yield self._generate(f"attack {tried}", rows, attack.max_new_tokens, None, size, 2)

    def _patching(self) -> Iterator[StagePlan]:
        calibration, tokens = self.rows.calibration, self.spec.pairs.max_new_tokens
        for label, weights, workers in (
            ("W", None, self.teachers),
            ("Q0", self.low_bits, self.answering - self.teachers),
        ):
            name, beside = f"generate {label}, calibration", bool(self.teachers) and label == "Q0"
            yield self._generate(name, calibration, tokens, weights, workers=workers, beside=beside)
        if self.spec.pairs.teacher_tokens:
            yield self._distributions()
        if self._compares():
            yield self._reference()
        yield self._patch()

    def _stage(self, name: str, parts: Parts, seconds: float, **more: Any) -> StagePlan:
        given = {"devices": self.cluster.count, "measured": True} | more
        return StagePlan(
            name=name,
            parts={part: size for part, size in parts.items() if size},
            seconds=seconds + self.shape.bytes * self.shape.parameters / self.known.load_gbs / 1e9,
            available=self.cluster.memory,
            host_available=self.cluster.host if self.cluster.device == "gpu" else 0.0,
            **given,
        )

    def _quantize(self) -> Iterator[StagePlan]:
        spec = self.spec.quantize
        method = spec.base if isinstance(spec, Critical16Spec) else spec
        if isinstance(spec, Critical16Spec):
            yield self._snip(spec)
        if method.method == "checkpoint":
            return
        needs = quantizing(method, self.shape, self.known, self.cluster.device)
        safety = getattr(method, "safety", None)  # which learns from the control's answers
        control = self.spec.control or safety is not None
        copies = 2 if control and method.method in {"llm_qat", "qlora"} else 1
        seconds = copies * self._compute(needs.flops, self.known.train_utilisation, 1)
        yield self._stage(
            f"quantize ({spec.method})",
            needs.parts,
            seconds + needs.scores * self.known.search_bytes / self.cluster.bandwidth,
            devices=1,
            measured=method.method == "llm_qat" and safety is None,
            host=float(self.shape.bytes * self.shape.parameters),
        )

    def _snip(self, spec: Critical16Spec) -> StagePlan:
        columns = self.known.prompt_tokens + spec.max_new_tokens
        batch = Batch(spec.batch_size, columns, spec.batch_size * spec.max_new_tokens)
        parts = memory.snip(self.shape, batch, self.cluster.device)
        flops = 4 * self.shape.parameters * spec.harmful * columns
        seconds = self._compute(flops, self.known.train_utilisation, 1)
        return self._stage("score W (critical16)", parts, seconds, devices=1, measured=False)

    def _generate(
        self,
        name: str,
        rows: int,
        new: int,
        weights: float | None,
        size: int | None = None,
        caches: int = 1,
        workers: int = 0,
        beside: bool = False,
    ) -> StagePlan:
        workers = workers or self.answering
        size = size or self.spec.evaluate.generate.batch_size
        each = min(size, math.ceil(rows / workers)) or 1
        batch = Batch(each, self.known.prompt_tokens + new, new)
        parts = memory.generate(self.shape, batch, weights, caches, self.each)
        batches = math.ceil(rows / each / workers)
        whole = memory.generate(self.shape, batch, weights, caches)
        read = (whole[WEIGHTS] + whole[memory.CACHE]) / (
            self.cluster.bandwidth * self.known.decode_bandwidth
        )
        prompts = 2 * self.shape.parameters * rows * self.known.prompt_tokens
        decoding = 2 * self.shape.parameters * rows * new
        share = self.known.score_utilisation
        # The GPUs of a worker compute one after the other.
        first = self._compute(prompts, share, workers)
        seconds = first + max(batches * new * read, self._compute(decoding, share, workers))
        devices = workers * self.each
        return self._stage(name, parts, seconds, devices=devices, beside=beside)

    def _distributions(self) -> StagePlan:
        pairs = self.spec.pairs
        columns = self.known.prompt_tokens + pairs.teacher_tokens
        answers = pairs.batch_size * pairs.teacher_tokens
        batch = Batch(pairs.batch_size, columns, answers)
        parts = memory.score(self.shape, batch, cached=True, log_probs=1, devices=self.each)
        flops = 2 * self.shape.parameters * self.rows.pool * columns
        seconds = self._compute(flops, self.known.score_utilisation, self.answering)
        return self._stage("pairs (W's distributions)", parts, seconds, measured=False)

    def _compares(self) -> bool:
        """Return whether Q0's own log-probs are read; TRL's DPO takes them on its way."""
        spec = self.spec.patch
        if spec.is_baseline:
            return spec.method == "dpo"
        return spec.objective.dpo > 0 or (spec.scores_by_gradient and spec.mask.loss == "dpo")

    def _reference(self) -> StagePlan:
        pairs = self.spec.pairs
        columns = self.known.prompt_tokens + pairs.max_new_tokens
        sequences = 2 * pairs.batch_size
        batch = Batch(sequences, columns, sequences * pairs.max_new_tokens)
        packed = self._packed()
        read = memory.score(
            self.shape, batch, cached=False, log_probs=2, weights=packed, devices=self.each
        )
        formed = float(self.shape.bytes * self.shape.largest)  # one layer's at a time
        parts = {**read, memory.FORMED: formed}
        flops = 2 * self.shape.parameters * 2 * self.rows.preferences * columns
        seconds = self._compute(flops, self.known.score_utilisation, self.answering)
        host = self._host() / self.each  # per GPU
        return self._stage("reference", parts, seconds, measured=False, host=host)

    def _patch(self) -> StagePlan:
        spec, shape = self.spec.patch, self.shape
        if spec.updates == "full":  # in float32
            shape = replace(shape, bytes=4)
        on_ray = self.spec.resources.workers > 0
        how = patching(
            spec,
            self.workers,
            self._group_size(),
            self.cluster.device,
            bits=code_bits(self.spec.quantize),
            distributed=on_ray and not spec.is_baseline,
        )
        answer, sequences, kl = self._row()
        columns = self.known.prompt_tokens + answer
        micro = self._micro()
        batch = Batch(micro * sequences, columns, micro * sequences * answer, micro * kl)
        if spec.method == "flips":
            return self._flips(how, batch)
        longest = self.spec.pairs.max_new_tokens
        scored = 2 if spec.mask.loss == "dpo" else 1
        scoring = Batch(
            micro * scored, self.known.prompt_tokens + longest, micro * scored * longest
        )
        parts = memory.patch(shape, how, batch, scoring)
        steps = steps_of(spec, self.rows.pool)
        flops = steps * spec.batch_size * sequences * columns * self._flops_per_token()
        passes = 8.0 if spec.gradient_checkpointing else 6.0
        forms = how.forms and spec.trains != "scales"
        forming = passes * spec.rank * shape.quantized if forms else 0.0
        micros = math.ceil(spec.batch_size / self.workers / micro)
        flops += steps * micros * self.workers * forming
        renewals = 1 + (steps // spec.mask.remask_every if spec.mask.remask_every else 0)
        if how.snip:
            samples = min(spec.mask.samples, max(1, self.rows.pool))
            kinds = 2 if spec.mask.score == "set_difference" else 1  # refusals, benign answers
            flops += kinds * renewals * samples * scoring.columns * self._flops_per_token()
        seconds = self._compute(flops, self.known.train_utilisation, self.workers)
        host = max(self._host(), self._packed() + memory.offloaded(shape, how))
        return self._stage("patch", parts, seconds, host=host, devices=self.workers)

    def _flips(self, how: Patching, batch: Batch) -> StagePlan:
        """Return the discrete patch, with all the rounds that it may take, each on other rows."""
        spec = self.spec.patch.flips
        forward = 2.0 * self.shape.parameters * spec.probe_rows
        tokens = self._row()[1] * batch.columns  # of a row
        flops = spec.rounds * tokens * (spec.rows * self._flops_per_token() + forward)
        seconds = self._compute(flops, self.known.train_utilisation, self.workers)
        return self._stage("patch", flips(self.shape, how, batch), seconds, host=self._host())

    def _row(self) -> tuple[int, int, int]:
        """Return a training row's answer tokens, its sequences, and positions with a teacher."""
        spec, longest = self.spec.patch.objective, self.spec.pairs.max_new_tokens
        if self.spec.patch.method == "sft":
            return longest, 1, 0
        kl = min(spec.kl_tokens, self.spec.pairs.teacher_tokens, longest) if spec.kl else 0
        only_kl = bool(spec.kl) and not (spec.dpo or spec.nll or spec.anchor)
        return (kl if only_kl else longest), 2 if spec.dpo else 1, kl

    def _micro(self) -> int:
        """Return the rows of a micro-batch, as `patch_data.share` (or `FlipLoss`) cuts them."""
        if self.spec.patch.method == "flips":
            return self.spec.patch.micro_batch_size
        most = math.ceil(self.spec.patch.batch_size / self.workers)
        return math.ceil(most / math.ceil(most / self.spec.patch.micro_batch_size))

    def _flops_per_token(self) -> float:
        """Forward 2 or twice 2, input gradients 2, weight gradients 2 (if formed), per weight."""
        spec = self.spec.patch
        formed = spec.mask.on == "weight" or spec.through_grid
        return (4.0 + 2.0 * formed + 2.0 * spec.gradient_checkpointing) * self.shape.parameters

    def _group_size(self) -> int:
        size = getattr(self.spec.quantize, "group_size", 64)
        return size if size > 0 else self.shape.hidden

    def _packed(self) -> float:
        """Return the bytes of Q0 as it lies in memory: codes, scales, and what is not quantized."""
        shape, size = self.shape, self._group_size()
        codes = shape.quantized * code_bits(self.spec.quantize) / 8
        return codes + shape.quantized / size * (shape.bytes + 1) + shape.bytes * shape.other

    def _host(self) -> float:
        """Return what a process holds while it loads Q0: decoded, or packed layer by layer."""
        shape = self.shape
        if self.spec.patch.method != "masked_lora":
            return float(HOST_COPIES * shape.bytes * shape.parameters + shape.quantized)
        return self._packed() + shape.bytes * shape.other + 4.0 * shape.largest

    def _compute(self, flops: float, utilisation: float, devices: int) -> float:
        return flops / (devices * self.cluster.tflops * 1e12 * utilisation)


def _stage_data(stage: StagePlan) -> dict[str, Any]:
    return {
        "name": stage.name,
        "fits": stage.fits,
        "gib": stage.bytes / GIB,
        "available_gib": stage.available / GIB,
        "parts_gib": {part: size / GIB for part, size in stage.parts.items()},
        "host_gib": stage.host / GIB,
        "devices": stage.devices,
        "seconds": stage.seconds,
        "beside": stage.beside,
        "device_hours": stage.device_hours,
        "measured": stage.measured,
    }
