"""Peak memory of one process on one device, by part, in bytes; measured against in docs/plan.md.

Every function returns what is held at the moment when most is. The patch has several candidates
(scoring, the backward pass, the optimizer step), so its phases are written down one by one and
the largest is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from qresafe.planning.shapes import ModelShape

Parts = Mapping[str, float]

WEIGHTS, CODES, MASKS = "weights", "codes and scales", "masks"
FORMED, ADAPTER, GRADIENTS = "rounded weights", "LoRA factors", "gradients"
OPTIMIZER, ACTIVATIONS, LOGITS = "optimizer", "activations", "logits"
CACHE, SCORES, BUFFERS = "KV cache", "SNIP scores", "buffers"
PARTS = (
    WEIGHTS, CODES, MASKS, FORMED, ADAPTER, GRADIENTS,
    OPTIMIZER, ACTIVATIONS, LOGITS, CACHE, SCORES, BUFFERS,
)  # fmt: skip

CPU_BLOCK, DEVICE_BLOCK = 1 << 18, 1 << 26  # core/blocks.py
KEPT_SCORES = 1 << 26  # core/snip.py: below it the sums stay on the device
SLACK = 1.25  # blocks by which accelerate lets a device hold more than its share
REDUCE_BUCKET = 500_000_000  # DeepSpeed's, in elements, allocated whole
PARAMETER_BUCKET = 50_000_000  # ZeRO-3's prefetch
# Bytes per trained weight of both of AdamW's moments; bitsandbytes' have a float32 scale per 256.
MOMENTS = {"adamw": 8.0, "adamw8bit": 2 * (1 + 4 / 256)}


@dataclass(frozen=True)
class Batch:
    """What one forward pass sees.

    Attributes:
        sequences: Rows of the padded batch.
        columns: Its length in tokens.
        answers: Positions whose logits are made.
        kl: Of these, the ones that are compared with a teacher's distribution.
    """

    sequences: int
    columns: int
    answers: int
    kl: int = 0

    @property
    def tokens(self) -> int:
        return self.sequences * self.columns


@dataclass(frozen=True)
class Patching:
    """The settings of a patch that its memory depends on.

    Attributes:
        rank: Of the LoRA factors.
        on: What the mask is over.
        through_grid: Whether the forward pass rounds.
        group_size: Weights per scale.
        bits: Of a code in memory; codes of 8 and more are not packed.
        accumulates: Whether a step has several micro-batches, so that gradients wait.
        remasks: Whether masks are renewed once the optimizer has its state.
        snip: Whether masks come from SNIP's scores.
        checkpointing: Whether activations are computed again in the backward pass.
        zero_stage: DeepSpeed's.
        world_size: Processes that train together.
        device: "cpu" forms weights in small blocks, "gpu" in large ones.
        latent: Whether it starts from latent weights, of which the offsets are held.
        trains: What it trains; "weights" are all of the quantized layers, without an adapter.
        offload: What ZeRO keeps in host memory.
    """

    rank: int
    on: Literal["weight", "factors"] = "weight"
    through_grid: bool = True
    group_size: int = 128
    bits: float = 4
    accumulates: bool = False
    remasks: bool = True
    snip: bool = True
    checkpointing: bool = False
    zero_stage: int = 0
    world_size: int = 1
    device: Literal["cpu", "gpu"] = "gpu"
    latent: bool = False
    trains: Literal["codes", "scales", "both", "weights"] = "codes"
    offload: Literal["none", "optimizer", "parameters"] = "none"

    @property
    def forms(self) -> bool:
        """Whether a whole weight is formed in every forward pass."""
        return self.on == "weight" or self.through_grid

    @property
    def keeps(self) -> bool:
        """Whether decoded weights are kept beside the codes: where nothing rounds them again."""
        return not self.through_grid and self.trains in ("codes", "weights")


def patch(shape: ModelShape, how: Patching, batch: Batch, scoring: Batch) -> Parts:
    """Return the parts of a patch's peak.

    Args:
        shape: Of the model.
        how: The patch's settings.
        batch: A micro-batch of training.
        scoring: One of SNIP's.
    """
    held = _held(shape, how)
    factors = 4.0 * _trained(shape, how)
    sharded = factors / how.world_size
    moments = 2 * (sharded if how.zero_stage else factors)
    gradients = sharded if how.zero_stage >= 2 else factors
    if how.offload != "none":
        moments, gradients = 0.0, factors if how.zero_stage == 1 else 0.0
    backward = held | graph(shape, how, batch) | {OPTIMIZER: moments}
    if how.accumulates:
        backward[GRADIENTS] = gradients
    phases = [backward, held | {GRADIENTS: gradients, OPTIMIZER: moments}]
    if how.snip:
        score = held | graph(shape, how, scoring, scored=True) | _scores(shape, how)
        phases.append(score | ({OPTIMIZER: moments} if how.remasks else {}))
    return peak(phases)


def offloaded(shape: ModelShape, how: Patching) -> float:
    """Return what one process keeps in host memory instead of on its device."""
    kept = {
        "none": 0.0,
        # float32 factors, both moments, and the gradient
        "optimizer": 16.0 * _trained(shape, how),
    }
    kept["parameters"] = kept["optimizer"] + _codes(shape, how) + _weights(shape, how)
    return kept[how.offload] / how.world_size


def _trained(shape: ModelShape, how: Patching) -> float:
    """Return how many numbers the optimizer moves."""
    if how.trains == "weights":
        return float(shape.quantized)
    factors = 0 if how.trains == "scales" else shape.factors(how.rank)
    scales = 0.0 if how.trains == "codes" else shape.quantized / how.group_size
    return factors + scales


def _codes(shape: ModelShape, how: Patching) -> float:
    return how.bits / 8 * shape.quantized


def _weights(shape: ModelShape, how: Patching) -> float:
    """Return the bytes of weights that lie there as such: what is not quantized, or kept."""
    return float(shape.bytes * (shape.other + (shape.quantized if how.keeps else 0)))


def _held(shape: ModelShape, how: Patching) -> dict[str, float]:
    """Return what lies there from beginning to end."""
    factors, shards = 4.0 * _trained(shape, how), how.world_size if how.zero_stage == 3 else 1
    away = how.offload == "parameters"
    codes, weights = _codes(shape, how), _weights(shape, how)
    block = (codes + weights - shape.bytes * shape.other) / shape.blocks
    gathered = block if shards > 1 or away else 0
    scales = shape.quantized / how.group_size * (shape.bytes + 1)
    ends = sum(rows + columns for rows, columns in shape.linears)
    masks = shape.quantized / 8 if how.on == "weight" else ends + 4 * factors
    masks = 0 if how.trains in ("scales", "weights") else masks
    flat = how.zero_stage and how.offload == "none"
    masters = factors / how.world_size if flat else 0  # DeepSpeed's flat copies
    found = {
        WEIGHTS: (0 if away else weights / shards) + gathered,
        CODES: (0 if away else codes / shards) + scales,
        MASKS: float(masks),
        ADAPTER: 0.0 if away or how.trains == "weights" else factors / shards + masters,
    }
    if how.latent:  # the offsets
        found[CODES] += 4.0 * shape.quantized
    if how.zero_stage and how.device == "gpu":  # on a CPU their untouched pages cost nothing
        prefetched = shape.bytes * PARAMETER_BUCKET if how.zero_stage == 3 else 0
        found[BUFFERS] = 4.0 * REDUCE_BUCKET + prefetched
    return found


def graph(
    shape: ModelShape, how: Patching, batch: Batch, *, scored: bool = False
) -> dict[str, float]:
    """Return what autograd keeps of a forward pass, at the moment when most of it is there."""
    if how.checkpointing:
        return _recomputed(shape, how, batch, scored=scored)
    width = shape.bytes
    return {
        FORMED: float(width * shape.quantized) if how.forms else 0.0,
        ACTIVATIONS: shape.blocks * batch.tokens * _block_activations(shape, how)
        + _ends(shape, batch),
        # The output head's are gone before the last block's backward pass needs room for its own.
        LOGITS: max(_loss(shape, batch, scored), _working(shape, how, batch, scored)),
    }


def _recomputed(
    shape: ModelShape, how: Patching, batch: Batch, *, scored: bool
) -> dict[str, float]:
    """Return the same where a block keeps its input only: at the loss, or in a block's gradient."""
    width = shape.bytes
    inputs = float(shape.blocks * width * batch.tokens * shape.hidden)
    at_loss = {
        FORMED: 0.0,
        ACTIVATIONS: inputs + _ends(shape, batch),
        LOGITS: _loss(shape, batch, scored),
    }
    in_block = {
        FORMED: width * shape.quantized / shape.blocks if how.forms else 0.0,
        ACTIVATIONS: inputs + batch.tokens * _block_activations(shape, how),
        LOGITS: _working(shape, how, batch, scored),
    }
    return max(at_loss, in_block, key=total)


def _ends(shape: ModelShape, batch: Batch) -> float:
    """Return the embeddings, and the last norm's float32."""
    return float(batch.tokens * shape.hidden * (shape.bytes + 4))


def _block_activations(shape: ModelShape, how: Patching) -> float:
    """Return the bytes that one token leaves in one block: the tensors that a gradient needs."""
    width, hidden, inner = shape.bytes, shape.hidden, shape.feed_forward
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    repeated = 2 * (queries if keys < queries else keys)  # keys and values, once per query head
    norms = 2 * 4 * hidden
    inputs = width * (2 * hidden + queries + inner)  # of the seven layers, shared where they can
    attention = width * (queries + repeated)
    gate = width * 3 * inner  # before and after the activation, and its partner
    beside = not how.forms and how.trains != "weights"
    return norms + inputs + attention + gate + (_low_rank(shape, how) if beside else 0)


def _low_rank(shape: ModelShape, how: Patching) -> float:
    """Return what a LoRA branch beside the frozen layer keeps of a token: float32 inputs, x A."""
    layers = len(shape.linears) / shape.blocks
    copies = 4 * sum(columns for _, columns in shape.linears) / shape.blocks
    return 4 * how.rank * layers + (copies if shape.bytes < 4 else 0)


def _loss(shape: ModelShape, batch: Batch, scored: bool) -> float:
    """Return the logits, their float32 forms and the gradients that are there with them."""
    width = shape.bytes
    answers = batch.answers - (0 if scored else batch.kl)
    entropy = width + 4 + 4 + 4  # logits, log-probabilities, and the gradients of both
    divergence = width + width + 4 + 4 + 4 + 4
    return float(shape.vocabulary * (answers * entropy + (0 if scored else batch.kl * divergence)))


def _working(shape: ModelShape, how: Patching, batch: Batch, scored: bool) -> float:
    """Return what a block's backward pass needs besides what the forward pass kept."""
    gradients = float(shape.bytes * batch.tokens * (shape.hidden + 3 * shape.feed_forward))
    if scored:  # no weight has a gradient then
        return gradients
    formed = shape.bytes * shape.largest if how.forms else 0
    return gradients + formed + _block(shape, how) * 8


def _block(shape: ModelShape, how: Patching) -> float:
    return float(min(shape.largest, CPU_BLOCK if how.device == "cpu" else DEVICE_BLOCK))


def _scores(shape: ModelShape, how: Patching) -> dict[str, float]:
    sums = 4.0 * shape.quantized
    on_device = sums if sums <= KEPT_SCORES else 0.0  # larger ones lie in files
    return {SCORES: on_device + _block(shape, how) * (4 + shape.bytes)}


def snip(shape: ModelShape, batch: Batch, device: Literal["cpu", "gpu"]) -> Parts:
    """Return the parts while SNIP scores full-precision weights, which lie on one device."""
    how = Patching(rank=1, on="factors", through_grid=False, device=device)
    held = {WEIGHTS: float(shape.bytes * shape.parameters)}
    return held | graph(shape, how, batch, scored=True) | _scores(shape, how)


def share_of(shape: ModelShape, devices: int) -> float:
    """Return the most of a model that one of several devices gets: whole blocks, balanced."""
    return 1.0 if devices == 1 else min(1.0, 1 / devices + SLACK / shape.blocks)


def generate(
    shape: ModelShape,
    batch: Batch,
    weights: float | None = None,
    caches: int = 1,
    devices: int = 1,
) -> Parts:
    """Return the parts while a batch of prompts is read and answered, on the fullest device.

    Args:
        shape: Of the model.
        batch: `columns` of prompt and new tokens together, `answers` of new tokens.
        weights: Bytes of the loaded model, where it is not dense.
        caches: Copies of the cache: an attack continues the same prompts several times.
        devices: Over which the model is spread.
    """
    width, share = shape.bytes, share_of(shape, devices)
    whole = float(width * shape.parameters if weights is None else weights)
    prompt = batch.sequences * (batch.columns - batch.answers)
    per_token = 2 * shape.kv_heads * shape.head_dim * width
    cache = per_token * batch.tokens * shape.blocks
    repeated = 2 * shape.heads * shape.head_dim * width * batch.tokens
    return {
        WEIGHTS: share * whole,
        CACHE: caches * share * cache + per_token * batch.tokens,
        ACTIVATIONS: max(_forward(shape, prompt), repeated),
        LOGITS: batch.sequences * shape.vocabulary * (width + 8.0),
    }


def score(
    shape: ModelShape,
    batch: Batch,
    *,
    cached: bool,
    log_probs: int,
    weights: float | None = None,
    devices: int = 1,
) -> Parts:
    """Return the parts of a forward pass that reads log-probabilities.

    Args:
        shape: Of the model.
        batch: What is read.
        cached: Whether the model fills a cache on the way.
        log_probs: float32 copies of the logits that are held together.
        weights: Bytes of the loaded model, where it is not dense.
        devices: Over which the model is spread.
    """
    width, share = shape.bytes, share_of(shape, devices)
    cache = 2 * shape.kv_heads * shape.head_dim * width * batch.tokens * shape.blocks
    return {
        WEIGHTS: share * (width * shape.parameters if weights is None else weights),
        CACHE: share * cache if cached else 0.0,
        ACTIVATIONS: _forward(shape, batch.tokens),
        LOGITS: float(batch.answers * shape.vocabulary * (width + 4 * log_probs)),
    }


def _forward(shape: ModelShape, tokens: int) -> float:
    """Return the activations of one block's forward pass without gradients."""
    feed = 3 * shape.feed_forward + 2 * shape.hidden
    heads = (
        3 * shape.heads * shape.head_dim + 2 * shape.kv_heads * shape.head_dim + 2 * shape.hidden
    )
    return float(shape.bytes * tokens * max(feed, heads))


def full_training(
    shape: ModelShape,
    batch: Batch,
    *,
    rounded: bool,
    teacher: bool,
    device: Literal["cpu", "gpu"],
    moments: float = MOMENTS["adamw"],
    checkpointing: bool = False,
) -> Parts:
    """Return the parts of LLM-QAT, or its control: float32 weights, all linear layers trained.

    `moments` are the bytes of the optimizer's state per weight: `MOMENTS` of its name.
    """
    wide = replace(shape, bytes=4)
    trained = 4.0 * wide.quantized
    how = Patching(
        rank=1,
        on="weight" if rounded else "factors",
        through_grid=rounded,
        device=device,
        checkpointing=checkpointing,
        trains="weights",
    )
    kept = graph(wide, how, batch)
    weights = 4.0 * wide.parameters * (2 if teacher else 1)
    held = {WEIGHTS: weights, OPTIMIZER: moments / 4 * trained}
    if checkpointing:  # the first block's gradient comes when all others are there
        return peak([held | kept | {GRADIENTS: trained}])
    forward = held | kept | {FORMED: trained if rounded else 0.0}
    return peak([forward, held | {GRADIENTS: trained}])


def peak(phases: Iterable[Parts]) -> Parts:
    """Return the phase that holds most."""
    return max(phases, key=total)


def total(parts: Parts) -> float:
    """Return the sum of all parts, bytes."""
    return float(sum(parts.values()))
