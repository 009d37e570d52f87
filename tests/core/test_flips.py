"""Greedy flips against brute force on small layers."""

from __future__ import annotations

import itertools

import pytest
import torch

from qresafe.core.flips import Move, best_flips, flip_count, greedy_move, undoing_move
from qresafe.core.fp8 import Fp8Grid
from qresafe.core.grids import NF4, QuantizedTensor, fit_codebook, fit_uniform
from qresafe.core.ladder import ladder_of
from qresafe.core.masks import iter_top_count
from qresafe.core.overlaid import KeptGrid


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(seed: int, bits: int = 3) -> QuantizedTensor:
    weight = drawn(4, 8, seed=seed)
    grid = fit_uniform(weight, bits, 4, False)
    return QuantizedTensor(grid, grid.encode(weight))


def nf4(seed: int) -> QuantizedTensor:
    weight = drawn(4, 8, seed=seed)
    grid = fit_codebook(weight, NF4, 8)
    return QuantizedTensor(grid, grid.encode(weight))


def fp8(seed: int) -> QuantizedTensor:
    grid = Fp8Grid(torch.full((4, 1), 0.01), -1, (4, 8))
    return QuantizedTensor(grid, grid.encode(drawn(4, 8, seed=seed)))


def moved(layers: dict[str, QuantizedTensor], move: Move) -> dict[str, QuantizedTensor]:
    return {
        name: QuantizedTensor(q.grid, move[name].apply(q.codes) if name in move else q.codes)
        for name, q in layers.items()
    }


def linear_loss(layers: dict[str, QuantizedTensor], gradients: dict[str, torch.Tensor]) -> float:
    """L = <gradient, w>: its first-order gains are exact."""
    return sum(float((q.dense() * gradients[n]).double().sum()) for n, q in layers.items())


@pytest.mark.parametrize("make", [uniform, nf4, fp8])
def test_the_gain_is_the_fall_of_a_linear_loss_code_by_code(make: object) -> None:
    layer = make(1)  # type: ignore[operator]
    gradient, ladder = drawn(4, 8, seed=9), ladder_of(layer.grid)
    target, gains = best_flips(layer, ladder, gradient)
    for row, column in itertools.product(range(4), range(8)):
        falls = [0.0]
        for neighbour in (ladder.down(layer.codes), ladder.up(layer.codes)):
            codes = layer.codes.clone()
            codes[row, column] = neighbour[row, column]
            before, after = layer.dense(), layer.grid.decode(codes)
            falls.append(float(((before - after) * gradient).double().sum()))
        assert float(gains[row, column]) == pytest.approx(max(falls), abs=1e-5)
    assert (target != layer.codes)[gains > 0].all()


def test_the_best_of_two_layers_flip_and_the_loss_falls_by_their_gains() -> None:
    layers = {"a": uniform(1), "b": nf4(2)}
    gradients = {"a": drawn(4, 8, seed=3), "b": drawn(4, 8, seed=4)}
    ladders = {name: ladder_of(q.grid) for name, q in layers.items()}
    every = torch.cat(
        [best_flips(q, ladders[n], gradients[n])[1].flatten() for n, q in layers.items()]
    )
    for count in (1, 5, 20):
        move = greedy_move(layers, ladders, gradients, count)
        assert flip_count(move) == count
        fall = linear_loss(layers, gradients) - linear_loss(moved(layers, move), gradients)
        assert fall == pytest.approx(float(every.topk(count).values.sum()), rel=1e-4)


def test_no_code_flips_without_a_gain() -> None:
    """32 codes, of which 31 have gradient 0: one flips, however many may."""
    layer = uniform(1)
    gradient = torch.zeros(4, 8)
    row, column = (layer.codes > layer.grid.low).nonzero()[0].tolist()
    gradient[row, column] = 1.0  # downwards is better
    move = greedy_move({"a": layer}, {"a": ladder_of(layer.grid)}, {"a": gradient}, 10)
    assert move["a"].positions.tolist() == [row * 8 + column]
    assert move["a"].changes.tolist() == [-1]


def test_codes_beneath_kept_weights_have_no_gain() -> None:
    layer = uniform(1)
    kept = KeptGrid(layer.grid, torch.tensor([0, 9]), torch.tensor([5.0, -5.0]))
    covered = QuantizedTensor(kept, layer.codes)
    gains = best_flips(covered, ladder_of(kept), torch.ones(4, 8))[1].flatten()
    assert gains[[0, 9]].tolist() == [0.0, 0.0]
    assert int((gains > 0).sum()) > 20


def test_undoing_takes_back_what_matters_least() -> None:
    start = {"a": uniform(1), "b": uniform(2)}
    gradients = {"a": drawn(4, 8, seed=3), "b": drawn(4, 8, seed=4)}
    ladders = {name: ladder_of(q.grid) for name, q in start.items()}
    now = moved(start, greedy_move(start, ladders, gradients, 12))
    harms = []  # of undoing each flip alone, by brute force on the linear loss
    for name in start:
        for place in (now[name].codes != start[name].codes).flatten().nonzero()[:, 0]:
            codes = now[name].codes.flatten().clone()
            codes[place] = start[name].codes.flatten()[place]
            one = now | {name: QuantizedTensor(now[name].grid, codes.view(4, 8))}
            harms.append(linear_loss(one, gradients) - linear_loss(now, gradients))
    assert len(harms) == 12
    back = undoing_move(now, start, gradients, 5)
    assert flip_count(back) == 5
    rise = linear_loss(moved(now, back), gradients) - linear_loss(now, gradients)
    assert rise == pytest.approx(sum(sorted(harms)[:5]), rel=1e-4)
    everything = moved(now, undoing_move(now, start, gradients, 12))
    assert all(torch.equal(everything[name].codes, start[name].codes) for name in start)


def test_exactly_count_scores_are_the_top_also_among_equals() -> None:
    scores = {"a": torch.tensor([3.0, 1.0, 2.0]), "b": torch.tensor([2.0, 2.0, 0.0])}
    masks = dict(iter_top_count(scores, 3))  # 3 and the first two of three equal 2s
    assert masks["a"].tolist() == [True, False, True]
    assert masks["b"].tolist() == [True, False, False]
    assert not any(mask.any() for _, mask in iter_top_count(scores, 0))
