"""The GPU bench's measurements: patch step, SNIP, grids and generation, each against a peer."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bench import snip
from bench.generation import until_end, word_tokenizer
from bench.gpu_model import (
    Budget,
    Limits,
    Shape,
    build,
    median_seconds,
    pair_batch,
    peak_gib,
    prompts,
    quantize,
    start_memory,
    timed,
)
from qresafe.core.grids import fit_uniform
from qresafe.core.masked_lora import attach
from qresafe.core.objectives import dpo_loss, sequence_logps
from qresafe.core.snip import SnipScorer
from qresafe.hf.answer_head import AnswerHead
from qresafe.hf.batching import left_pad, length_plan
from qresafe.hf.generate import generate_batch
from qresafe.stages.patch_loss import answer_logps

BETA, TAU, RANK, ALPHA, LR = 0.1, 0.6, 128, 256.0, 5e-6  # rank and alpha: the paper's appendix
REFERENCE = -900.0  # the precomputed log-probs of random answers; their value costs no time


@dataclass(frozen=True)
class Place:
    """Where the bench runs.

    Attributes:
        device: A torch device.
        dtype: Of the models.
        limits: What the hardware can do.
        budget: What time is left.
    """

    device: torch.device
    dtype: torch.dtype
    limits: Limits
    budget: Budget


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: What was measured.
        value: In `unit`; None where nothing could be measured, `note` says why.
        unit: "tokens/s" or "GB/s": more is better.
        peer: Name of a row of the same shape that it is compared with.
        memory: Peak GiB on the device.
        share: Of the hardware's limit, 0 to 1, and of which one.
        note: Free text.
    """

    what: str
    value: float | None = None
    unit: str = ""
    peer: str | None = None
    memory: float | None = None
    share: float | None = None
    note: str = ""


# ---------------------------------------------------------------- patch step

PEFT_STEP = "DPO step, PEFT LoRA"


def patch_step(shape: Shape, place: Place, on: str, through_grid: bool) -> Row:
    """Time DPO steps of the patch over a mask kind."""
    model = build(shape, place.device, place.dtype)
    quantized = quantize(model)
    options = {"rank": RANK, "alpha": ALPHA, "on": on, "through_grid": through_grid, "seed": 0}
    layers = attach(model, quantized, **options)
    for layer in layers.values():  # which entries are in the mask does not change the time
        masks = [torch.rand(mask.shape, device=mask.device) < TAU for mask in layer.masks]
        layer.set_masks(tuple(masks))
    head = AnswerHead(model)

    def logps(batch: Any) -> Tensor:
        return answer_logps(head.logits(model, batch.ids, batch.positions), batch)

    what = f"DPO step, mask `{on}`" + (", through the grid" if through_grid else "")
    return _train(what, model, logps, shape, place, peer=PEFT_STEP)


def peft_step(shape: Shape, place: Place) -> Row:
    """Time DPO steps of a PEFT LoRA adapter on the same rounded weights."""
    from peft import LoraConfig, get_peft_model

    model = build(shape, place.device, place.dtype)
    names = list(quantize(model))
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=names)
    model = get_peft_model(model, config)

    def logps(batch: Any) -> Tensor:
        given = {"input_ids": batch.ids, "attention_mask": batch.attention_mask}
        return sequence_logps(model(**given, use_cache=False).logits, batch.labels)

    return _train(PEFT_STEP, model, logps, shape, place)


def _train(
    what: str,
    model: Any,
    logps: Callable[[Any], Tensor],
    shape: Shape,
    place: Place,
    peer: str | None = None,
) -> Row:
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=LR)
    reference = torch.full((shape.pairs,), REFERENCE, device=place.device)

    def step(batch: Any) -> None:
        chosen, rejected = logps(batch).float().split(shape.pairs)
        dpo_loss(chosen, rejected, reference, reference, BETA).mean().backward()
        nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    batches = [pair_batch(shape, place.device, seed) for seed in range(shape.steps)]
    for batch in batches[:2]:
        step(batch)  # warm-up, with the optimizer's state
    start_memory(place.device)
    times = []
    for batch in batches:
        place.budget.check()
        times.append(timed(place.device, step, batch)[0])
    speed = statistics.median(b.tokens / t for b, t in zip(batches, times, strict=True))
    # Forward and the gradients of inputs: 4 operations per frozen weight and token.
    share = 4 * _weights(model) * speed / place.limits.flops
    return Row(what, speed, "tokens/s", peer, peak_gib(place.device), share, "of matmul")


def _weights(model: nn.Module) -> int:
    """Return how many frozen weights the layers have: each is multiplied by every token."""
    named = model.named_parameters()
    return sum(p.numel() for name, p in named if "_proj" in name and not p.requires_grad)


# ---------------------------------------------------------------- SNIP

WEIGHT_GRADIENTS = "forward+backward, weight gradients"


def snip_scores(shape: Shape, place: Place, in_files: bool) -> Row:
    """Time SNIP scoring with its sums in files (the default at this size) or on the device."""
    model = build(shape, place.device, place.dtype)
    scorer = SnipScorer(snip.linear_layers(model), keep_bytes=0 if in_files else 1 << 62)
    where = "in files" if in_files else "on the device"

    def work(batch: snip.Batch) -> None:
        snip.snip(model, scorer, [batch])

    return _score(f"SNIP, sums {where}", model, work, shape, place, peer=WEIGHT_GRADIENTS)


def weight_gradients(shape: Shape, place: Place) -> Row:
    """Time a forward and backward pass that computes the same layers' weight gradients."""
    model = build(shape, place.device, place.dtype)
    layers = snip.linear_layers(model)

    def work(batch: snip.Batch) -> None:
        snip.peer(model, layers, [batch])

    return _score(WEIGHT_GRADIENTS, model, work, shape, place)


def _score(
    what: str,
    model: Any,
    work: Callable[[snip.Batch], None],
    shape: Shape,
    place: Place,
    peer: str | None = None,
) -> Row:
    count = shape.pairs * shape.steps
    lengths = (shape.shortest, shape.longest)
    batches = snip.mixed_batches(count, shape.pairs, *lengths, shape.vocabulary, place.device)
    start_memory(place.device)
    work(batches[0])  # warm-up
    spent = 0.0
    for batch in batches:
        place.budget.check()
        spent += timed(place.device, work, batch)[0]
    speed = sum(ids.numel() for ids, _ in batches) / spent
    share = 6 * _weights(model) * speed / place.limits.flops
    return Row(what, speed, "tokens/s", peer, peak_gib(place.device), share, "of matmul")


# ---------------------------------------------------------------- grids


def grids(shape: Shape, place: Place) -> Iterator[Row]:
    """Yield the bandwidth of decode, snap and of the patch step's rounding on an INT4 grid.

    Only what must be read and written counts: codes 1 byte, the model's dtype, and float32 for
    the change; the scales of groups of 128 are left out.
    """
    # Four layers in one, larger than any cache.
    size = (4 * shape.feed_forward, shape.hidden)
    weight = torch.randn(size, device=place.device).to(place.dtype)
    grid = fit_uniform(weight, 4, 128, symmetric=False)
    codes = grid.encode(weight)
    change = torch.zeros(size, device=place.device)
    width = weight.element_size()
    ways: dict[str, tuple[Callable[[], Any], int]] = {
        "decode": (lambda: grid.decode(codes), 1 + width),
        "snap": (lambda: grid.snap(weight), 2 * width),
        "snap of codes + change, in place": (lambda: grid.snap_moved_(codes, change), 1 + 4 + 4),
    }
    for name, (work, bytes_each) in ways.items():
        place.budget.check()
        speed = bytes_each * weight.numel() / median_seconds(work, place.device)
        share = speed / place.limits.bytes_per_second
        yield Row(name, speed / 1e9, "GB/s", share=share, note="of the copy")


# ---------------------------------------------------------------- generation

GENERATE = "model.generate"


def generation(shape: Shape, place: Place) -> Iterator[Row]:
    """Yield the tokens/s of `generate_batch` in planned batches, and of `model.generate`.

    Both answer the same prompts of mixed lengths greedily, with the same batch size, limit and
    end token; the peer takes them in the order in which they come.
    """
    model = build(shape, place.device, place.dtype)
    asked = prompts(shape)
    tokenizer = word_tokenizer(shape.vocabulary)
    given = range(len(asked))
    in_order = [list(given[i : i + shape.prompts]) for i in given[:: shape.prompts]]
    planned = length_plan([len(prompt) for prompt in asked], shape.prompts)
    # The fields of GenerateSpec that a greedy batch reads: pydantic may be missing here.
    spec = SimpleNamespace(max_new_tokens=shape.new_tokens, temperature=0.0, top_k=0, top_p=1.0)

    def ours(rows: list[int]) -> list[list[int]]:
        mine = [asked[row] for row in rows]
        made = generate_batch(model, tokenizer, mine, [str(row) for row in rows], spec)
        return [answer.ids for answer in made]

    def peer(rows: list[int]) -> list[list[int]]:
        ids, mask = (part.to(place.device) for part in left_pad([asked[row] for row in rows], 0))
        options = {"do_sample": False, "max_new_tokens": shape.new_tokens}
        made = model.generate(ids, attention_mask=mask, **options)
        return [until_end(row) for row in made[:, ids.shape[1] :].tolist()]

    yield _answers(GENERATE, model, peer, in_order, place)
    yield _answers("generate_batch", model, ours, planned, place, peer=GENERATE)


def _answers(
    what: str,
    model: Any,
    complete: Callable[[list[int]], list[list[int]]],
    batches: list[list[int]],
    place: Place,
    peer: str | None = None,
) -> Row:
    complete(batches[0])  # warm-up
    start_memory(place.device)
    tokens = steps = 0
    spent = 0.0
    for batch in batches:
        place.budget.check()
        took, answers = timed(place.device, complete, batch)
        spent += took
        tokens += sum(map(len, answers))
        steps += max(map(len, answers))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    # Every step reads all weights once (written counts nothing): the least that decoding moves.
    share = steps * size / spent / place.limits.bytes_per_second
    return Row(what, tokens / spent, "tokens/s", peer, peak_gib(place.device), share, "of the copy")
