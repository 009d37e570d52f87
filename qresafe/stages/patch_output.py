"""What a finished patch leaves behind, as plain safetensors and JSON lines.

adapter.safetensors  <layer>.A, <layer>.B and, for factor masks, their anchors and references;
                     <layer>.log_scale where scales are trained
masks.safetensors    <layer>.<mask>: 8 entries a byte; shapes as JSON in the metadata
codes.safetensors    <layer>: int8 codes of snap(Q0 + delta), on Q0's grid
delta.safetensors    <layer>: the unrounded change M * (B A) alpha/rank, float32; with a latent
                     start or trained scales, the unrounded weight less Q0's
scales.safetensors   <layer>: its scales, in the checkpoint's type; only where they are trained
history.jsonl        one line per step
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor
from torch.nn import functional as F
from upath import UPath

from qresafe.artifacts import new_file, read_bytes, write_bytes, write_text
from qresafe.core.masks import pack_bits
from qresafe.core.patched import PatchedLinear
from qresafe.core.scales import scale_of
from qresafe.hf.shards import tensor_writer
from qresafe.stages.train_engine import TrainEngine

Layers = Mapping[str, PatchedLinear]
Change = tuple[str, Tensor, Tensor]  # a layer, its new codes, and the change of its weight


def write_results(
    engine: TrainEngine, layers: Layers, history: Sequence[Mapping[str, Any]], folder: UPath
) -> None:
    """Write all files of a finished patch; collective, but only rank 0 writes."""

    def changes() -> Iterator[Change]:
        for name, layer in _gathered(engine, layers):
            if not engine.rank:
                yield name, layer.codes(), layer.delta()

    if engine.rank:
        list(changes())  # its part in gathering them
    else:
        write_changes(folder, changes())
    _write_trained(engine, layers, folder)
    if not engine.rank:
        write_history(folder, history)


def write_changes(folder: UPath, changes: Iterable[Change]) -> None:
    """Write codes.safetensors and delta.safetensors, one layer in memory at a time.

    Args:
        folder: Of the patch.
        changes: Layer name, its new codes, and how far its weight is from Q0's.
    """
    with (
        _tensors(folder / "codes.safetensors") as add_codes,
        _tensors(folder / "delta.safetensors") as add_delta,
    ):
        for name, codes, delta in changes:
            add_codes(name, codes)
            add_delta(name, delta)


def _write_trained(engine: TrainEngine, layers: Layers, folder: UPath) -> None:
    adapter: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, layer in _gathered(engine, layers):
        if engine.rank:
            continue
        adapter |= {f"{name}.{kind}": p.detach().clone() for kind, p in layer.trained.items()}
        if layer.log_scale is not None:
            scales[name] = scale_of(layer.exported().grid)
        for kind, value in layer.state().items():
            if value.dtype == torch.bool:
                masks[f"{name}.{kind}"] = pack_bits(value)
                shapes[f"{name}.{kind}"] = list(value.shape)
            else:
                adapter[f"{name}.{kind}"] = value
    if engine.rank:
        return
    write_tensors(folder / "adapter.safetensors", adapter)
    write_tensors(folder / "masks.safetensors", masks, {"shapes": json.dumps(shapes)})
    if scales:
        write_tensors(folder / "scales.safetensors", scales)


def write_history(folder: UPath, history: Sequence[Mapping[str, Any]]) -> None:
    """Write history.jsonl: one line per step."""
    write_text(folder / "history.jsonl", "".join(json.dumps(r) + "\n" for r in history))


def codes_changed(engine: TrainEngine, layers: Layers) -> float:
    """Return the fraction of all codes that differ from Q0's now; collective."""
    changed = total = 0
    for _, layer in _gathered(engine, layers):
        changed += int((layer.codes() != layer.codes0).sum())
        total += layer.codes0.numel()
    return changed / total


def scales_changed(engine: TrainEngine, layers: Layers) -> float:
    """Return the fraction of all scales that differ from Q0's now; collective."""
    changed = total = 0
    for _, layer in _gathered(engine, layers):
        old, new = scale_of(layer.grid), scale_of(layer.exported().grid)
        changed += int((new != old).sum())
        total += old.numel()
    return changed / total


@contextmanager
def as_exported(engine: TrainEngine, layers: Layers) -> Iterator[None]:
    """Let all layers compute with the weights that their export would have within the block.

    The weights are formed once, not in every forward pass; collective.
    """
    try:
        with torch.no_grad():
            for _, layer in _gathered(engine, layers):
                weight = layer.exported().dense().to(layer.weight.dtype)
                # An attribute of the instance goes before the class's method.
                layer.forward = partial(F.linear, weight=weight, bias=layer.bias)  # type: ignore[method-assign]
            yield
    finally:
        for layer in layers.values():
            layer.__dict__.pop("forward", None)


def write_tensors(
    path: UPath, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file that a reader sees whole or not at all."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, safetensors.save(plain, metadata))


@contextmanager
def _tensors(path: UPath) -> Iterator[Callable[[str, Tensor], None]]:
    """Give a function that adds a tensor to a safetensors file, which appears whole or not."""
    with new_file(path) as made, tensor_writer(made) as add:
        yield lambda name, tensor: add(name, tensor.detach().cpu().contiguous())


def read_tensors(path: UPath) -> dict[str, Tensor]:
    """Read a safetensors file from any storage."""
    return safetensors.load(read_bytes(path))


def _gathered(engine: TrainEngine, layers: Layers) -> Iterator[tuple[str, PatchedLinear]]:
    for name, layer in layers.items():
        with engine.gathered(layer.parameters(recurse=False)):
            yield name, layer
