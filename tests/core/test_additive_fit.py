"""AQLM's fit: each of its three steps lowers the loss, and reaches what a dense solver does."""

from __future__ import annotations

import torch
from torch import Tensor

from qresafe.core.additive_fit import (
    FLOOR,
    AdditiveFit,
    FitSettings,
    damped,
    fit_additive,
    initial_fit,
    kmeans,
    loss,
    update_codebooks,
    update_codes,
    update_scales,
)

SETTINGS = FitSettings(codebooks=2, bits=4, group_size=4, rounds=5)


def problem() -> tuple[Tensor, Tensor]:
    """Return a weight (24, 16), and X X^T of inputs that hang together."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(16, 16, generator=draw) @ torch.randn(16, 300, generator=draw)
    return torch.randn(24, 16, generator=draw), damped(inputs @ inputs.T)


def start() -> tuple[AdditiveFit, Tensor, Tensor]:
    weight, hessian = problem()
    return initial_fit(weight, SETTINGS, torch.Generator().manual_seed(0)), weight, hessian


def test_loss_is_the_error_of_the_outputs() -> None:
    draw = torch.Generator().manual_seed(0)
    weight, quantized, inputs = (torch.randn(4, 4, generator=draw) for _ in range(3))
    outputs = (weight - quantized) @ inputs
    assert abs(loss(weight, quantized, inputs @ inputs.T) - float(outputs.square().sum())) < 1e-4


def test_every_step_lowers_the_loss() -> None:
    fit, weight, hessian = start()
    seen = [loss(weight, fit.dense(), hessian)]
    for _ in range(2):
        update_codes(fit, weight, hessian, beam=4)
        seen.append(loss(weight, fit.dense(), hessian))
        update_codebooks(fit, weight, hessian, steps=30)
        seen.append(loss(weight, fit.dense(), hessian))
        update_scales(fit, weight, hessian)
        seen.append(loss(weight, fit.dense(), hessian))
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] < 0.5 * seen[0]


def test_codebooks_reach_the_least_squares_solution() -> None:
    """Oracle: the design matrix written out and solved densely in float64."""
    fit, weight, hessian = start()
    root = torch.linalg.cholesky(hessian.double())  # rows: w @ root has the loss as its square
    columns = []
    for place in range(fit.codebooks.numel()):
        unit = torch.zeros(fit.codebooks.numel(), dtype=torch.float64)
        unit[place] = 1
        column = AdditiveFit(unit.view_as(fit.codebooks), fit.scales.double(), fit.indices)
        columns.append((column.dense() @ root).flatten())
    design, wanted = torch.stack(columns, 1), (weight.double() @ root).flatten()
    best = torch.linalg.lstsq(design, wanted[:, None], driver="gelsd").solution[:, 0]
    least = float((design @ best - wanted).square().sum())
    update_codebooks(fit, weight, hessian, steps=400)
    reached = loss(weight, fit.dense(), hessian)
    assert least * 0.999 <= reached <= least * 1.01


def test_one_group_and_one_codebook_take_the_best_code() -> None:
    draw = torch.Generator().manual_seed(0)
    weight, root = torch.randn(7, 4, generator=draw), torch.randn(4, 9, generator=draw)
    books, hessian = torch.randn(1, 8, 4, generator=draw), root @ root.T
    fit = AdditiveFit(books, torch.ones(7, 1), torch.zeros(7, 1, 1, dtype=torch.long))
    update_codes(fit, weight, hessian, beam=1)
    outputs = ((weight[:, None] - books[0]) @ root).square().sum(2)  # every row with every vector
    assert fit.indices[:, 0, 0].tolist() == outputs.argmin(1).tolist()


def test_scales_are_the_best_for_their_codes() -> None:
    fit, weight, hessian = start()
    update_scales(fit, weight, hessian)
    best = loss(weight, fit.dense(), hessian)
    for factor in (0.99, 1.01):
        assert loss(weight, fit.dense() * factor, hessian) > best


def test_kmeans_finds_clusters_that_lie_apart() -> None:
    points = torch.tensor([[0.0], [0.2], [10.0], [10.4]])
    for seed in range(3):
        centres = kmeans(points, 2, 10, torch.Generator().manual_seed(seed))
        assert sorted(round(float(c), 4) for c in centres) == [0.1, 10.2]


def test_the_whole_fit_ends_and_repeats_itself() -> None:
    weight, hessian = problem()
    runs = [fit_additive(weight, hessian, SETTINGS, torch.Generator().manual_seed(0)) for _ in "ab"]
    assert runs[0][1] == runs[1][1]
    assert torch.equal(runs[0][0].dense(), runs[1][0].dense())
    assert runs[0][1][-1] < runs[0][1][0] < 1
    assert len(runs[0][1]) <= 1 + SETTINGS.rounds


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weight, _ = problem()
    fit, history = fit_additive(
        weight, torch.zeros(16, 16), SETTINGS, torch.Generator().manual_seed(0)
    )
    assert torch.isfinite(fit.dense()).all()
    assert history[-1] < history[0]


def test_the_turns_end_where_rounding_to_16_bits_costs_more() -> None:
    """Six codebooks of 4 bits on groups of 2: 12 bits a weight, far finer than float16."""
    weight, hessian = problem()
    settings = FitSettings(codebooks=6, bits=4, group_size=2, tolerance=1e-6)
    fit, history = fit_additive(weight, hessian, settings, torch.Generator().manual_seed(0))
    assert len(history) < 1 + settings.rounds
    assert history[-1] < FLOOR <= history[-2]
    rounded = AdditiveFit(fit.codebooks.half().float(), fit.scales.half().float(), fit.indices)
    hessian = damped(hessian)
    whole = loss(weight, torch.zeros_like(weight), hessian)
    assert loss(weight, rounded.dense(), hessian) / whole > 2 * history[-1]
