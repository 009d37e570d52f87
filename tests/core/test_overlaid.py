"""Grids with an adapter or 16-bit weights on top, against the same arithmetic done by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qresafe.core.grids import NF4, Grid, fit_codebook, fit_uniform
from qresafe.core.overlaid import AdaptedGrid, KeptGrid, OverlaidGrid
from qresafe.core.sparse_patch import pack_positions, unpack_positions

SHAPE = (6, 24)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bases() -> list[Grid]:
    weight = draw(0, *SHAPE)
    return [fit_uniform(weight, bits, 10, symmetric=False) for bits in (2, 3, 4, 8)] + [
        fit_codebook(weight, NF4, 16)
    ]


def adapted(base: Grid) -> AdaptedGrid:
    return AdaptedGrid(base, draw(1, 2, SHAPE[1]) / 10, draw(2, SHAPE[0], 2) / 10, 0.5)


def kept(base: Grid) -> KeptGrid:
    positions = torch.tensor([0, 5, 23, 24, 100, 143])
    return KeptGrid(base, positions, (9 + torch.arange(6)).half())


def grids() -> list[OverlaidGrid]:
    return [make(base) for base in bases() for make in (adapted, kept)]


def codes_of(grid: OverlaidGrid) -> Tensor:
    """Return codes of a weight, those beneath kept weights being the kept values' own."""
    return grid.encode(grid.cover_(draw(3, *SHAPE)))


@pytest.mark.parametrize("grid", grids(), ids=lambda g: f"{type(g).__name__}")
def test_snapping_what_was_decoded_changes_no_code(grid: OverlaidGrid) -> None:
    codes = codes_of(grid)
    assert torch.equal(grid.encode(grid.decode(codes)), codes)
    assert torch.equal(grid.snap(grid.decode(codes)), grid.decode(codes))


@pytest.mark.parametrize("grid", grids(), ids=lambda g: f"{type(g).__name__}")
def test_moving_by_nothing_changes_no_code_and_in_place_is_the_same(grid: OverlaidGrid) -> None:
    codes, delta = codes_of(grid), draw(4, *SHAPE)
    delta[:, ::2] = 0
    moved = grid.move(codes, delta)
    assert torch.equal(moved[:, ::2], codes[:, ::2])
    assert not torch.equal(moved, codes)
    torch.testing.assert_close(grid.snap_moved_(codes, delta), grid.decode(moved))


@pytest.mark.parametrize("grid", grids(), ids=lambda g: f"{type(g).__name__}")
def test_blocks_of_rows_decode_as_the_whole(grid: OverlaidGrid) -> None:
    codes = codes_of(grid)
    for block in (slice(0, 2), slice(2, 6), slice(4, 4)):
        part = grid.rows(block)
        torch.testing.assert_close(part.decode(codes[block]), grid.decode(codes)[block])
    assert grid.to(dtype=torch.bfloat16).decode(codes).dtype == torch.bfloat16


def test_an_adapter_is_added_and_kept_weights_stand() -> None:
    base = bases()[2]
    codes = base.encode(draw(3, *SHAPE))
    with_adapter = adapted(base)
    # (6, 2) x (2, 24) x alpha / rank = 1 / 2
    expected = base.decode(codes) + with_adapter.B @ with_adapter.A * 0.5
    torch.testing.assert_close(with_adapter.decode(codes), expected)
    with_kept = kept(base)
    decoded = with_kept.decode(codes)
    assert decoded[0, 0] == 9  # position 0
    assert decoded[1, 0] == 12  # position 24 of rows of 24
    others = torch.ones(SHAPE, dtype=torch.bool).view(-1)
    others[with_kept.positions] = False
    assert torch.equal(decoded.view(-1)[others], base.decode(codes).view(-1)[others])


def test_no_patch_moves_a_code_beneath_a_kept_weight() -> None:
    grid = kept(bases()[2])
    codes = codes_of(grid)
    moved = grid.move(codes, torch.full(SHAPE, 0.7))
    assert torch.equal(moved.view(-1)[grid.positions], codes.view(-1)[grid.positions])


@pytest.mark.parametrize("count", [0, 1, 7, 1000])
def test_positions_survive_packing(count: int) -> None:
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(count))
    positions = order[:count].sort().values
    packed = pack_positions(1000, positions)
    size, found = unpack_positions(packed, "here")
    assert size == 1000
    assert torch.equal(found, positions)
    if count == 7:  # floor(log2(1000 / 7)) = 7: at most 7 + 2 bits each, in whole bytes
        assert packed["lower"].numel() == 7  # 49 bits
        assert packed["upper"].numel() == 2  # 1000 >> 7 is 7, and 7 ones and one more: 15 bits
