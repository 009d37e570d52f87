"""A grid over re-ordered columns against the same grid over columns put in order by hand."""

from __future__ import annotations

import torch

from qresafe.core.grids import fit_uniform
from qresafe.core.permuted import PermutedGrid

# Two groups of two: columns 0 and 2 belong to group 1, columns 1 and 3 to group 0.
GROUP_OF = torch.tensor([1, 0, 1, 0])
ORDERED = [1, 3, 0, 2]


def test_each_column_is_rounded_with_its_own_group() -> None:
    weight = torch.tensor([[0.30, 8.0, 0.14, -8.0]])
    base = fit_uniform(weight[:, ORDERED], bits=4, group_size=2, symmetric=False)
    grid = PermutedGrid.by_group(base, GROUP_OF)
    assert grid.order.tolist() == ORDERED
    codes = grid.encode(weight)
    # Group 1 spans [0, .3] in steps of .02, so .3 is 15 steps and .14 is 7 above the lowest, -8;
    # group 0 spans [-8, 8] in steps of 16/15, with 0 at -8 + 7.5, rounded to the even 0.
    assert (codes[0, [0, 2]] + 8).tolist() == [15, 7]
    torch.testing.assert_close(grid.decode(codes)[0, [0, 2]], weight[0, [0, 2]])
    torch.testing.assert_close(grid.snap(weight), grid.decode(codes))
    assert torch.equal(grid.encode(grid.decode(codes)), codes)


def test_moves_equal_those_of_the_ordered_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 32, generator=generator)
    group_of = torch.arange(32) % 4
    order = torch.argsort(group_of, stable=True)
    base = fit_uniform(weight[:, order], bits=3, group_size=8, symmetric=True)
    grid = PermutedGrid.by_group(base, group_of)
    codes, delta = grid.encode(weight), torch.randn(6, 32, generator=generator)
    moved = grid.move(codes, delta)
    assert torch.equal(moved[:, order], base.move(codes[:, order], delta[:, order]))
    torch.testing.assert_close(grid.snap_moved_(codes, delta.clone()), grid.decode(moved))
    assert torch.equal(grid.move(codes, torch.zeros_like(delta)), codes)
    rows = grid.rows(slice(2, 5))
    assert torch.equal(rows.decode(codes[2:5]), grid.decode(codes)[2:5])
