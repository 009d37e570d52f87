"""A grid's scales as something that a patch may train: w = level(code) * scale.

Not every grid has scales that a format stores as they are, see `scale_of`. A trained scale is
s exp(t) with t = 0 at the start, so it keeps its sign and t is a relative change at every width;
it is rounded to the type in which it is stored. As w is proportional to it, dL/dt is the sum of
w dL/dw over the weights of the scale.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from qresafe.core.fp8 import Fp8Grid
from qresafe.core.grids import CodebookGrid, Grid, UniformGrid, per_group
from qresafe.core.permuted import PermutedGrid
from qresafe.errors import ModelError


def scale_of(grid: Grid, where: str = "the layer") -> Tensor:
    """Return a grid's scales: (out or 1, groups), or one for each block of a codebook grid.

    Raises:
        ModelError: There are none of its own: codebooks are added up, or an adapter or 16-bit
            weights lie above the codes and would not be scaled along.
    """
    if isinstance(grid, UniformGrid | Fp8Grid):
        return grid.scale
    if isinstance(grid, CodebookGrid):
        return grid.absmax
    if isinstance(grid, PermutedGrid):
        return scale_of(grid.base, where)
    what = f"weights of a {type(grid).__name__} are not codes times a scale"
    raise ModelError(what, where=where, remedy="set patch.trains to codes")


def with_scale(grid: Grid, scale: Tensor) -> Grid:
    """Return the grid with other scales, which it decodes in their type (codebooks: its own)."""
    if isinstance(grid, PermutedGrid):
        return replace(grid, base=with_scale(grid.base, scale))
    if isinstance(grid, CodebookGrid):
        return replace(grid, absmax=scale)
    if isinstance(grid, UniformGrid | Fp8Grid):
        return replace(grid, scale=scale)
    raise TypeError(f"{type(grid).__name__} has no scales")


def rescaled(grid: Grid, log_change: Tensor) -> Grid:
    """Return the grid with its scales times exp(log_change), rounded to the type they have."""
    scale = scale_of(grid)
    return with_scale(grid, unrounded_scale(grid, log_change).to(scale.dtype))


def unrounded_scale(grid: Grid, log_change: Tensor) -> Tensor:
    """Return the grid's scales times exp(log_change), float32."""
    return scale_of(grid).float() * log_change.float().exp()


def sum_by_scale(grid: Grid, matrix: Tensor) -> Tensor:
    """Return the sums of a matrix (out, in) over the weights of each scale, in their shape."""
    if isinstance(grid, PermutedGrid):
        return sum_by_scale(grid.base, matrix[:, grid.order])
    if isinstance(grid, CodebookGrid):
        flat = matrix.reshape(-1)
        padded = F.pad(flat, (0, -flat.numel() % grid.block_size))
        return padded.view(-1, grid.block_size).sum(1)
    if not isinstance(grid, UniformGrid | Fp8Grid):
        raise TypeError(f"{type(grid).__name__} has no scales")
    parts = [part.sum(-1) for (part,) in per_group(matrix, grid.group_size)]
    sums = torch.cat(parts, dim=1)
    return sums.sum(0, keepdim=True) if len(grid.scale) == 1 else sums
