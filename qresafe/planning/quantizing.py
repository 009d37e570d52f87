"""What a quantizer needs: the memory of a device, the work, and what its code search reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from qresafe.planning import memory
from qresafe.planning.memory import WEIGHTS, Batch, Parts
from qresafe.planning.shapes import ModelShape
from qresafe.planning.workload import Assumptions
from qresafe.quantize_specs import AqlmSpec, CalibrationSpec, LlmQatSpec, QloraSpec

# Per weight and token: forward 2, gradients of inputs 2, of weights 2; LoRA's are small.
FORWARD, FULL, ADAPTER = 2.0, 6.0, 4.0
Device = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class Quantizing:
    """What one pass of a quantizer needs.

    Attributes:
        parts: Peak memory of a device.
        flops: Of training or calibration.
        scores: Of AQLM's code search: (group of weights, hypothesis, codebook vector) compared.
    """

    parts: Parts
    flops: float = 0.0
    scores: float = 0.0


def quantizing(method: Any, shape: ModelShape, known: Assumptions, device: Device) -> Quantizing:
    """Return what a quantizer needs of one device; a chat is two `prompt_tokens` long."""
    if isinstance(method, LlmQatSpec):
        return _llm_qat(method, shape, known, device)
    if isinstance(method, QloraSpec):
        learned = _steps(method, known) * method.batch_size * 2 * known.prompt_tokens
        return Quantizing(_float32(shape), ADAPTER * shape.parameters * learned)
    if isinstance(method, AqlmSpec):
        return _aqlm(method, shape, known)
    if method.method in {"gptq", "awq"}:
        tokens = float(method.sequences * method.max_length)
        activations = shape.bytes * tokens * shape.hidden
        parts = {WEIGHTS: shape.bytes * shape.parameters, memory.ACTIVATIONS: activations}
        return Quantizing(parts, FULL * shape.parameters * tokens)
    return Quantizing({WEIGHTS: 4.0 * shape.largest})  # one layer at a time


def chats_of(spec: CalibrationSpec, known: Assumptions) -> int:
    """Return how many chats a quantizer learns from: a file's rows where they are known."""
    if spec.path is not None:
        return known.rows.get(spec.path, known.default_rows)
    if spec.risk == "II":
        return spec.obedient
    return spec.benign + (spec.harmful if spec.risk == "III" else 0)


def _steps(method: LlmQatSpec | QloraSpec, known: Assumptions) -> int:
    if method.epochs is None:
        return method.steps
    batches = math.ceil(chats_of(method.calibration, known) / method.batch_size)
    return max(1, round(method.epochs * batches))


def _llm_qat(
    method: LlmQatSpec, shape: ModelShape, known: Assumptions, device: Device
) -> Quantizing:
    answer = known.prompt_tokens
    batch = _with_safety(Batch(method.batch_size, 2 * answer, method.batch_size * answer), method)
    parts = memory.full_training(
        shape,
        batch,
        rounded=True,
        teacher=method.loss == "self_distill",
        device=device,
        moments=memory.MOMENTS[method.optimizer],
        checkpointing=method.gradient_checkpointing,
    )
    per_weight = FULL + FORWARD * method.gradient_checkpointing
    return Quantizing(parts, per_weight * shape.parameters * _steps(method, known) * batch.tokens)


def _with_safety(batch: Batch, method: LlmQatSpec) -> Batch:
    """Return a batch of chats with the rows that safety terms add to the same backward pass."""
    if (spec := method.safety) is None:
        return batch
    rows = spec.batch_size * (2 * bool(spec.dpo) + bool(spec.anchor))
    tokens = rows * (batch.columns // 2 + spec.max_new_tokens)  # a prompt and an answer each
    sequences = batch.sequences + math.ceil(tokens / batch.columns)
    return Batch(sequences, batch.columns, batch.answers + rows * spec.max_new_tokens)


def _aqlm(method: AqlmSpec, shape: ModelShape, known: Assumptions) -> Quantizing:
    chats = min(chats_of(method.calibration, known), method.sequences)
    length = min(2 * known.prompt_tokens, method.max_length)
    tuned = method.finetune_steps * method.batch_size * length
    # Twice forward: for the second moments, and to pass on what the quantized block makes.
    work = 2 * FORWARD * chats * length + FULL * tuned
    groups = shape.quantized / method.group_size
    compared = method.beam * method.codebooks * 2.0**method.codebook_bits
    return Quantizing(_float32(shape), work * shape.parameters, groups * compared * method.rounds)


def _float32(shape: ModelShape) -> Parts:
    return {WEIGHTS: 4.0 * shape.parameters, memory.FORMED: 4.0 * shape.largest}
