"""What the GPU bench measures with: random Llama shapes, preference batches, and a clock."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.snip import linear_layers
from qresafe.core.grids import QuantizedTensor, fit_uniform

GIB = 1 << 30


class OutOfTimeError(Exception):
    """The bench's time is used up."""


class Budget:
    """The seconds that a whole bench may take; `check` stops a measurement between two steps.

    Args:
        minutes: Allowed in all.
        reserve: Seconds of it kept back: for imports before, for the step in hand, for the table.
    """

    def __init__(self, minutes: float, reserve: float = 60.0) -> None:
        self.began = time.monotonic()
        self.deadline = self.began + 60 * minutes - reserve

    def check(self) -> None:
        """Raise OutOfTimeError if nothing more may start."""
        if time.monotonic() > self.deadline:
            raise OutOfTimeError


@dataclass(frozen=True)
class Shape:
    """A randomly initialised Llama, and how much it is given to do.

    Attributes:
        pairs: Preference pairs per optimizer step; a SNIP batch has as many rows.
        shortest: Tokens of the shortest sequence, prompt and answer together.
        longest: Tokens of the longest.
        steps: Timed optimizer steps, SNIP batches, and batches of generated answers.
        prompts: Prompts per batch of answers.
        new_tokens: Of every answer at most.
    """

    name: str
    hidden: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000
    pairs: int = 4
    shortest: int = 256
    longest: int = 512
    steps: int = 5
    prompts: int = 32
    new_tokens: int = 64


SHAPES = {
    "tiny": Shape("tiny", 128, 256, 2, 4, 2, 512, 2, 12, 24, 1, 2, 4),
    "1b": Shape("1b", 2048, 8192, 16, 32, 8),
    "7b": Shape("7b", 4096, 11008, 32, 32, 32),
}


def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    """Return the shape's Llama, made on `device` in `dtype`, frozen."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def quantize(model: nn.Module, group_size: int = 128) -> dict[str, QuantizedTensor]:
    """Round all linear layers but the head to INT4 in place; return their grids and codes."""
    found = {}
    for name, layer in linear_layers(model).items():
        grid = fit_uniform(layer.weight, 4, group_size, symmetric=False)
        found[name] = QuantizedTensor(grid, grid.encode(layer.weight))
        layer.weight.copy_(found[name].dense())
    return found


@dataclass(frozen=True)
class PairBatch:
    """Chosen answers, then rejected ones, as the patch loop lays them out and as trainers do.

    Attributes:
        ids: (S, columns), padded at the right.
        attention_mask: (S, columns).
        labels: (S, columns), -100 for prompt and padding.
        positions: (N,) where each answer token is predicted, in the flattened `ids`.
        targets: (N,) the answer tokens.
        sequence: (N,) the sequence of each answer token.
        answer_tokens: (S,) answer tokens per sequence.
        tokens: Of all sequences, without padding.
    """

    ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    positions: Tensor
    targets: Tensor
    sequence: Tensor
    answer_tokens: Tensor
    tokens: int


def pair_batch(shape: Shape, device: torch.device, seed: int) -> PairBatch:
    """Return `shape.pairs` random pairs; the second half of each sequence is the answer."""
    generator = torch.Generator().manual_seed(seed)
    high = shape.longest + 1
    lengths = torch.randint(shape.shortest, high, (2 * shape.pairs, 1), generator=generator)
    columns = int(lengths.max())
    ids = torch.randint(3, shape.vocabulary, (len(lengths), columns), generator=generator)
    place = torch.arange(columns)
    inside, answer = place < lengths, (place >= lengths // 2) & (place < lengths)
    ids = ids.where(inside, 0)
    sequence, column = answer.nonzero(as_tuple=True)
    return PairBatch(
        ids=ids.to(device),
        attention_mask=inside.long().to(device),
        labels=ids.where(answer, -100).to(device),
        positions=(sequence * columns + column - 1).to(device),
        targets=ids[answer].to(device),
        sequence=sequence.to(device),
        answer_tokens=answer.sum(1).to(device),
        tokens=int(lengths.sum()),
    )


def prompts(shape: Shape) -> list[list[int]]:
    """Return token ids of prompts of half a sequence's lengths, in random order."""
    draw = random.Random(0)
    low, high = shape.shortest // 4, shape.longest // 2
    lengths = [draw.randint(low, high) for _ in range(shape.prompts * shape.steps)]
    return [[draw.randrange(8, shape.vocabulary) for _ in range(n)] for n in lengths]


def settle(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, work: Callable[..., Any], *given: Any) -> tuple[float, Any]:
    """Return the wall-clock seconds of `work(*given)` on `device`, and its result."""
    settle(device)
    began = time.perf_counter()
    result = work(*given)
    settle(device)
    return time.perf_counter() - began, result


def median_seconds(work: Callable[[], Any], device: torch.device, times: int = 10) -> float:
    """Return the median over `times` calls, after one that warms up."""
    work()
    return statistics.median(timed(device, work)[0] for _ in range(times))


def start_memory(device: torch.device) -> None:
    """Free what nothing holds any more, and start a new peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    """Return the peak of allocated memory since `start_memory`, GiB; None where nobody counts."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) / GIB


@dataclass(frozen=True)
class Limits:
    """What the hardware can do at most, measured in the same run.

    Attributes:
        bytes_per_second: Read and written by a copy within the device's memory.
        flops: Of a large matrix product in the model's dtype, per second.
    """

    bytes_per_second: float
    flops: float


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Time a copy (1 GiB on a GPU) and a matrix product (8192 cubed on a GPU)."""
    size, edge = (GIB, 8192) if device.type == "cuda" else (1 << 22, 256)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source), device)
    a = torch.randn(edge, edge, device=device, dtype=dtype)
    out = torch.empty_like(a)
    product = median_seconds(lambda: torch.mm(a, a, out=out), device)
    return Limits(2 * size / copy, 2 * edge**3 / product)
