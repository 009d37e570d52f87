"""SNIP over N pairs against one forward and backward pass over the same pairs, in the same run.

The peer computes the weight gradients of the same layers. Time is the best of alternating
repetitions (other work on the machine only adds) over pairs of 64 to 256 tokens. Memory is the
peak of PyTorch's allocations above the model, while two 2-token samples (whose activations are
small) are scored and masks are cut from the scores; the sums of scores lie in files and are
reported beside it.

    python -m bench.snip            # a Llama with 34 M parameters, on a GPU if there is one
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qresafe.core.masks import iter_top_fraction, pack_bits
from qresafe.core.snip import SnipScorer

Batch = tuple[Tensor, Tensor]  # ids, labels: (rows, tokens)


def llama(hidden: int, layers: int, vocabulary: int) -> nn.Module:
    """Return a randomly initialised Llama of the usual proportions, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=hidden * 11 // 4,
        num_attention_heads=max(hidden // 64, 1),
        num_key_value_heads=max(hidden // 64, 1),
        vocab_size=vocabulary,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def mixed_batches(
    pairs: int, rows: int, shortest: int, longest: int, vocabulary: int, device: torch.device
) -> list[Batch]:
    """Return right-padded batches, planned by length; the second half of each row is answer."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(shortest, longest + 1, (pairs,), generator=generator).sort().values
    batches = []
    for part in lengths.split(rows):
        shape = (len(part), int(part.max()))
        ids = torch.randint(0, vocabulary, shape, generator=generator)
        position = torch.arange(shape[1])
        answer = (position >= part[:, None] // 2) & (position < part[:, None])
        batches.append((ids.to(device), torch.where(answer, ids, -100).to(device)))
    return batches


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return what a patch covers: every linear layer but the head."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }


def backward(model: nn.Module, batches: list[Batch]) -> None:
    """Run sum over samples of -log p(y|x), forward and backward."""
    for ids, labels in batches:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        F.cross_entropy(
            logits.flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum"
        ).backward()


def peer(model: nn.Module, layers: dict[str, nn.Module], batches: list[Batch]) -> None:
    """One forward and backward pass that computes the layers' weight gradients."""
    for layer in layers.values():
        layer.requires_grad_(True)
    backward(model, batches)
    model.requires_grad_(False)
    model.zero_grad(set_to_none=True)


def snip(model: nn.Module, scorer: SnipScorer, batches: list[Batch]) -> None:
    """SNIP sums over the same pairs."""
    with scorer:
        backward(model, batches)


def cut_masks(scorer: SnipScorer) -> list[Tensor]:
    """Threshold the scores at tau = 0.6 and return the masks, bit-packed."""
    return [pack_bits(mask) for _, mask in iter_top_fraction(scorer.scores(), 0.6)]


def snip_peak(
    model: nn.Module, layers: dict[str, nn.Module], batches: list[Batch], device: torch.device
) -> int:
    """Return the peak bytes of scoring and of cutting masks, above the model."""
    # Made outside: the profiler would count its mapped files as if they were memory.
    scorer = SnipScorer(layers, keep_bytes=0)

    def work() -> list[Tensor]:
        snip(model, scorer, batches)
        return cut_masks(scorer)

    return peak_bytes(work, device)


def measure(
    *,
    hidden: int = 512,
    layers: int = 8,
    vocabulary: int = 8192,
    pairs: int = 16,
    rows: int = 4,
    shortest: int = 64,
    longest: int = 256,
    repeats: int = 3,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
) -> dict[str, Any]:
    """Return times (seconds), their ratio, and peak memory (bytes) with its bound."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = llama(hidden, layers, vocabulary).to(device=place, dtype=dtype).requires_grad_(False)
    named = linear_layers(model)
    batches = mixed_batches(pairs, rows, shortest, longest, vocabulary, place)
    short = mixed_batches(2, 2, 2, 2, vocabulary, place)
    tries: dict[str, list[tuple[float, float]]] = {"peer": [], "snip": [], "mask": []}
    peer(model, named, batches[:1])  # warm-up
    for _ in range(repeats):
        tries["peer"].append(_seconds(partial(peer, model, named, batches), place))
        scorer = SnipScorer(named, keep_bytes=0)
        tries["snip"].append(_seconds(partial(snip, model, scorer, batches), place))
        tries["mask"].append(_seconds(partial(cut_masks, scorer), place))
    seconds = {name: min(wall for wall, _ in values) for name, values in tries.items()}
    cpu_seconds = {name: min(cpu for _, cpu in values) for name, values in tries.items()}
    sizes = [layer.weight.numel() for layer in named.values()]
    gradient = max(sizes) * dtype.itemsize
    return {
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "scored_weights": sum(sizes),
        "tokens": sum(ids.numel() for ids, _ in batches),
        "seconds": seconds,
        "ratio": seconds["snip"] / seconds["peer"],
        "cpu_seconds": cpu_seconds,  # what a machine shared with other work still measures
        "cpu_ratio": cpu_seconds["snip"] / cpu_seconds["peer"],
        "ratio_bound": 1.25,
        "peak_bytes": snip_peak(model, named, short, place),
        "peak_bound": 3 * gradient + sum(sizes) // 8,
        "largest_gradient_bytes": gradient,
        "file_bytes": 4 * sum(sizes),
    }


def _seconds(work: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Return wall-clock and processor seconds of `work`."""
    _settle(device)
    began, cpu_began = time.perf_counter(), time.process_time()
    work()
    _settle(device)
    return time.perf_counter() - began, time.process_time() - cpu_began


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Return the peak of PyTorch's allocations during `work`, above those at its start."""
    if device.type == "cuda":
        _settle(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return int(torch.cuda.max_memory_allocated(device) - before)
    with _profiled() as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"
    )
    alive = peak = 0
    for _, change in changes:
        alive += change
        peak = max(peak, alive)
    return peak


def _profiled() -> AbstractContextManager[Any]:
    profiler: AbstractContextManager[Any] = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    )
    return profiler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("hidden", 512), ("layers", 8), ("pairs", 16), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = vars(parser.parse_args())
    print(json.dumps(measure(**options | {"dtype": getattr(torch, options["dtype"])}), indent=1))


if __name__ == "__main__":
    main()
