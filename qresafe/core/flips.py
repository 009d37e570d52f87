"""Which codes to flip to a neighbour: the greedy first-order step of a discrete patch.

A flip changes one weight by the distance to the next level of its grid. To first order the loss
then falls by gain = -dL/dw * (value(neighbour) - value(code)); a round takes the codes with the
largest gains of all layers. No adapter, no latent weight and no optimizer state is involved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from qresafe.core.grids import QuantizedTensor
from qresafe.core.ladder import Ladder
from qresafe.core.masks import LazyScores, iter_top_count
from qresafe.core.sparse_patch import SparseDiff, diff

Layers = Mapping[str, QuantizedTensor]
Gradients = Mapping[str, Tensor]  # layer -> dL/dw, (out, in)
Move = dict[str, SparseDiff]  # layer -> changed codes; layers without any are left out


def gain(layer: QuantizedTensor, target: Tensor, gradient: Tensor) -> Tensor:
    """Return by how much the loss falls, to first order, for each code that goes to `target`.

    Args:
        layer: Present codes on their grid, one per weight.
        target: Codes, (out, in).
        gradient: dL/dw, (out, in).
    """
    change = layer.grid.decode(target).float() - layer.dense().float()
    return -gradient.float() * change


def best_flips(layer: QuantizedTensor, ladder: Ladder, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the better of each code's two neighbours, and the gain of going there.

    Returns:
        Codes, and float32 gains >= 0, (out, in): 0 where neither neighbour promises anything.
    """
    down, up = ladder.down(layer.codes), ladder.up(layer.codes)
    fall, rise = gain(layer, down, gradient), gain(layer, up, gradient)
    # abs: HistogramQuantile reads bit patterns, and those of -0 are not in order.
    return torch.where(fall >= rise, down, up), torch.maximum(fall, rise).clamp_(min=0).abs_()


def greedy_move(
    layers: Layers, ladders: Mapping[str, Ladder], gradients: Gradients, count: int
) -> Move:
    """Return the flips with the `count` largest gains of all layers; fewer if fewer have one.

    Gains are made when read, so that no more than one layer's are held at a time.
    """

    def best(name: str) -> tuple[Tensor, Tensor]:
        return best_flips(layers[name], ladders[name], gradients[name])

    def maker(name: str) -> Callable[[], Tensor]:
        return lambda: best(name)[1]

    scores = LazyScores({name: maker(name) for name in layers})
    move: Move = {}
    for name, chosen in iter_top_count(scores, count):
        if chosen.any():
            target, gains = best(name)
            codes = layers[name].codes
            move[name] = diff(codes, torch.where(chosen & (gains > 0), target, codes))
    return {name: part for name, part in move.items() if len(part.positions)}


def undoing_move(layers: Layers, start: Layers, gradients: Gradients, count: int) -> Move:
    """Return the way back to `start` of those `count` changed codes that seem to matter least.

    What matters least is what raises the loss least, to first order, when it is undone.

    Args:
        layers: Name -> present codes.
        start: Name -> the codes before any flip, on the same grids.
        gradients: Of the present model.
        count: How many codes to undo, at most all that changed.
    """
    back = {name: diff(layers[name].codes, start[name].codes) for name in layers}
    gains = {
        name: gain(layers[name], start[name].codes, gradients[name]).flatten()[part.positions]
        for name, part in back.items()
    }
    order = torch.cat(list(gains.values())).argsort(descending=True, stable=True)
    chosen = torch.zeros(len(order), dtype=torch.bool)
    chosen[order[:count].cpu()] = True
    move: Move = {}
    for (name, part), mine in zip(
        back.items(), chosen.split([len(g) for g in gains.values()]), strict=True
    ):
        if mine.any():
            move[name] = SparseDiff(part.size, part.positions[mine], part.changes[mine])
    return move


def flip_count(move: Move) -> int:
    """Return how many codes a move changes."""
    return sum(len(part.positions) for part in move.values())
