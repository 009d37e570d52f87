"""The neighbours of a code: the grid's next smaller and next larger weight.

On a grid of single weights the levels stand in a row, like the rungs of a ladder: integer codes by
number, a codebook by the value of its entries, 8-bit floats by value. Two codes of one level (FP4
and FP8 have two of 0) are one rung. What lies above a grid (an adapter, 16-bit weights, an order
of columns) does not change the rungs; additive codebooks have none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qresafe.core.fp8 import E4M3, Fp8Grid
from qresafe.core.grids import CodebookGrid, Grid, UniformGrid
from qresafe.core.wrapped import WrappedGrid
from qresafe.errors import ModelError


@dataclass(frozen=True)
class Ladder:
    """Neighbours as tables; the code at an end of the ladder is its own neighbour.

    Args:
        low: The code of the tables' first entry.
        below: int8, the code of the next smaller level.
        above: int8, the code of the next larger level.
    """

    low: int
    below: Tensor
    above: Tensor

    def to(self, device: torch.device) -> Ladder:
        """Return the ladder with its tables on `device`."""
        return Ladder(self.low, self.below.to(device), self.above.to(device))

    def down(self, codes: Tensor) -> Tensor:
        """Return the codes of the next smaller levels."""
        return self.below[codes.long() - self.low]

    def up(self, codes: Tensor) -> Tensor:
        """Return the codes of the next larger levels."""
        return self.above[codes.long() - self.low]


def ladder_of(grid: Grid, where: str = "the model") -> Ladder:
    """Return the ladder of a grid, on the CPU.

    Args:
        grid: Of a layer.
        where: The layer, for messages.

    Raises:
        ModelError: One of its codes stands for several weights, so codes have no order.
    """
    while isinstance(grid, WrappedGrid):
        grid = grid.base
    if isinstance(grid, UniformGrid):
        levels = torch.arange(grid.low, grid.high + 1).float()
    elif isinstance(grid, CodebookGrid):
        levels = grid.codebook.float().cpu()
    elif isinstance(grid, Fp8Grid):
        levels = torch.arange(grid.low, grid.high + 1, dtype=torch.int8).view(E4M3).float()
    else:
        what = "a code of this format stands for several weights and has no neighbours to flip to"
        raise ModelError(what, where=where, remedy="use patch.method: masked_lora")
    return _climb(levels, grid.low)


def _climb(levels: Tensor, low: int) -> Ladder:
    """Return the ladder of codes low, low + 1, ... with these levels; NaN is no level."""
    rungs, rung_of = torch.unique(levels[~levels.isnan()], return_inverse=True)
    codes = torch.arange(low, low + len(levels))
    valid = codes[~levels.isnan()]
    # Of two codes of one level the first is the one that others arrive at.
    first = torch.full((len(rungs),), low + len(levels)).scatter_reduce(0, rung_of, valid, "amin")
    below, above = codes.clone(), codes.clone()
    for table, step in ((below, -1), (above, 1)):
        reached = rung_of + step
        inside = (reached >= 0) & (reached < len(rungs))
        table[(valid - low)[inside]] = first[reached[inside]]
    return Ladder(low, below.to(torch.int8), above.to(torch.int8))
