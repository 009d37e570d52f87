"""AQLM's fit of codebooks, codes and scales to what a layer computes (arXiv 2401.06118).

The loss of a weight W (out, in) replaced by What is ||(W - What) X||^2 = sum over rows of
(w - what) H (w - what)^T with H = X X^T of the calibration inputs. It is lowered in turns: codes by
beam search, codebooks by conjugate gradients, scales in closed form; none of the three can raise
it. Two departures from the paper's program: the beam search treats one group of inputs at a time,
all rows together, instead of whole rows; the codebooks solve their least squares by conjugate
gradients instead of Adam, which needs no rate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qresafe.core.additive import decode_groups, residual_codes, search

DAMPING = 0.01  # of H's mean diagonal, as in GPTQ: makes every group's part of H invertible
FLOOR = 1e-7  # of the loss: what rounding codebooks and scales to float16 adds


@dataclass
class AdditiveFit:
    """Codebooks (M, K, group), scales (out, 1) and indices (out, in / group, M) of one weight."""

    codebooks: Tensor
    scales: Tensor
    indices: Tensor

    def dense(self) -> Tensor:
        """Return the weight (out, in), differentiable in codebooks and scales."""
        sums = decode_groups(self.codebooks, self.indices.flatten(0, 1))
        return sums.view(len(self.indices), -1) * self.scales


@dataclass(frozen=True)
class FitSettings:
    """How far the fit goes.

    Attributes:
        codebooks: M.
        bits: Width of a code; a codebook has 2^bits vectors.
        group_size: Weights per code.
        beam: Hypotheses per group in the code search.
        rounds: Most turns of codes, codebooks and scales.
        tolerance: The turns end when one lowers the loss by less than this share, or at FLOOR.
        kmeans_steps: Lloyd steps of each codebook's start.
        solver_steps: Conjugate gradient steps per turn.
    """

    codebooks: int
    bits: int
    group_size: int
    beam: int = 8
    rounds: int = 20
    tolerance: float = 0.01
    kmeans_steps: int = 20
    solver_steps: int = 50


def fit_additive(
    weight: Tensor, hessian: Tensor, settings: FitSettings, generator: torch.Generator
) -> tuple[AdditiveFit, list[float]]:
    """Return the fit of a weight and its relative loss after the start and after every turn.

    Args:
        weight: (out, in), finite.
        hessian: H, (in, in), positive semi-definite.
        settings: Sizes and limits; there must be more groups than vectors in a codebook.
        generator: Of the k-means starts.
    """
    weight = weight.float()
    hessian = damped(hessian.float())
    fit = initial_fit(weight, settings, generator)
    whole = loss(weight, torch.zeros_like(weight), hessian)
    history = [loss(weight, fit.dense(), hessian) / whole]
    for _ in range(settings.rounds):
        update_codes(fit, weight, hessian, settings.beam)
        update_codebooks(fit, weight, hessian, settings.solver_steps)
        update_scales(fit, weight, hessian)
        history.append(loss(weight, fit.dense(), hessian) / whole)
        if history[-1] > history[-2] * (1 - settings.tolerance) or history[-1] < FLOOR:
            break
    return fit, history


def damped(hessian: Tensor) -> Tensor:
    """Return H plus DAMPING times its mean diagonal; the identity if H is 0."""
    mean = hessian.diagonal().mean()
    ridge = DAMPING * mean if mean > 0 else torch.ones_like(mean)
    return hessian + ridge * torch.eye(len(hessian), device=hessian.device)


def loss(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """Return ||(W - What) X||^2."""
    error = weight - quantized
    return float(((error @ hessian) * error).sum(dtype=torch.float64))


def initial_fit(weight: Tensor, settings: FitSettings, generator: torch.Generator) -> AdditiveFit:
    """Return the start: rows of equal length, and a k-means codebook for what each one leaves."""
    scales = weight.norm(dim=1, keepdim=True) / weight.shape[1] ** 0.5
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    left = (weight / scales).reshape(-1, settings.group_size)
    targets, books = left, []
    for _ in range(settings.codebooks):
        book = kmeans(left, 1 << settings.bits, settings.kmeans_steps, generator)
        left = left - book[nearest(left, book)]
        books.append(book)
    codebooks = torch.stack(books)
    indices = residual_codes(targets, codebooks)
    return AdditiveFit(codebooks, scales, indices.view(len(weight), -1, settings.codebooks))


def kmeans(points: Tensor, count: int, steps: int, generator: torch.Generator) -> Tensor:
    """Return `count` centres of the points (n, d) after `steps` Lloyd steps from drawn points.

    A centre that no point is nearest to stays where it is.
    """
    drawn = torch.randperm(len(points), generator=generator)[:count].to(points.device)
    centres = points[drawn].clone()
    for _ in range(steps):
        labels = nearest(points, centres)
        sums = torch.zeros_like(centres).index_add_(0, labels, points)
        sizes = torch.bincount(labels, minlength=count)[:, None]
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
    return centres


def nearest(points: Tensor, centres: Tensor) -> Tensor:
    """Return the index of the centre nearest to each point."""
    return residual_codes(points, centres[None])[:, 0]


def update_codes(fit: AdditiveFit, weight: Tensor, hessian: Tensor, beam: int) -> None:
    """Search new codes group by group, all rows together; the loss never rises.

    With all other groups fixed, the loss of group j's part u of What is, but for a constant,
    |L^T (t - u)|^2, where L L^T = H_jj and t = u + H_jj^-1 H_j: (w - what). So a plain nearest
    search does it, among codebook vectors that are mapped by L^T.
    """
    error = weight - fit.dense()
    group = fit.codebooks.shape[2]
    for j in range(fit.indices.shape[1]):
        columns = slice(j * group, (j + 1) * group)
        factor = torch.linalg.cholesky(hessian[columns, columns])
        old = decode_groups(fit.codebooks, fit.indices[:, j]) * fit.scales
        pull = torch.cholesky_solve((error @ hessian[:, columns]).T, factor).T
        targets = ((old + pull) / fit.scales) @ factor
        books = fit.codebooks @ factor
        fit.indices[:, j] = search(targets, fit.indices[:, j], books, beam, sweeps=1)
        new = decode_groups(fit.codebooks, fit.indices[:, j]) * fit.scales
        error[:, columns] += old - new


def update_codebooks(fit: AdditiveFit, weight: Tensor, hessian: Tensor, steps: int) -> None:
    """Lower the loss over all codebooks at once, by conjugate gradients on its normal equations."""

    def pulled_back(error: Tensor) -> Tensor:
        """Return (error H) gathered by code: the gradient of codebooks, (M, K, group)."""
        parts = ((error @ hessian) * fit.scales).reshape(-1, group)
        gathered = torch.zeros_like(fit.codebooks)
        for m, column in enumerate(fit.indices.flatten(0, 1).T):
            gathered[m].index_add_(0, column, parts)
        return gathered

    group = fit.codebooks.shape[2]
    left = pulled_back(weight - fit.dense())
    direction, size = left.clone(), left.square().sum()
    floor = 1e-10 * size
    for _ in range(steps):
        if size <= floor:
            break
        image = pulled_back(AdditiveFit(direction, fit.scales, fit.indices).dense())
        curvature = (direction * image).sum()
        if curvature <= 0:
            break
        step = size / curvature
        fit.codebooks = fit.codebooks + step * direction
        left = left - step * image
        size, old = left.square().sum(), size
        direction = left + size / old * direction


def update_scales(fit: AdditiveFit, weight: Tensor, hessian: Tensor) -> None:
    """Set each row's scale to the best one for its codes; a row that decodes to 0 keeps its own."""
    unscaled = AdditiveFit(fit.codebooks, torch.ones_like(fit.scales), fit.indices).dense()
    seen = unscaled @ hessian
    length = (seen * unscaled).sum(1, keepdim=True)
    best = (seen * weight).sum(1, keepdim=True) / length
    usable = torch.isfinite(best) & (best.abs() > 1e-6)
    fit.scales = torch.where(usable, best, fit.scales)
