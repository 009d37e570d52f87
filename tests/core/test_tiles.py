"""Kept tiles against loops over every weight, and grids that show them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qresafe.core.grids import NF4, fit_codebook, fit_uniform
from qresafe.core.overlaid import KeptGrid
from qresafe.core.tiles import Tiles, count_tiles, cut, fits

cases = st.fixed_dictionaries(
    {
        "tile": st.tuples(st.integers(1, 5), st.integers(1, 9)),
        "down": st.integers(1, 4),
        "across": st.integers(1, 5),
        "share": st.floats(0, 1),
        "bits": st.integers(2, 8),
        "seed": st.integers(0, 10_000),
    }
)


def made(case) -> tuple[Tiles, torch.Generator]:
    """Return random tiles; `across` is 1 in a fifth of the cases, where one row high are rows."""
    draw = torch.Generator().manual_seed(case["seed"])
    rows, columns = case["tile"]
    shape = (rows * case["down"], columns * case["across"])
    ids = (torch.rand(count_tiles(shape, case["tile"]), generator=draw) < case["share"]).nonzero()
    values = torch.randn(len(ids), rows, columns, generator=draw).half()
    return Tiles(shape, ids[:, 0], values), draw


def dense(tiles: Tiles, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight with the tiles in it, and which weights are theirs: one at a time."""
    found, kept = weight.double(), torch.zeros(tiles.shape, dtype=torch.bool)
    rows, columns = tiles.tile
    for number, tile in zip(tiles.ids.tolist(), tiles.values, strict=True):
        band, place = divmod(number, tiles.shape[1] // columns)
        for row in range(rows):
            for column in range(columns):
                at = band * rows + row, place * columns + column
                found[at], kept[at] = float(tile[row, column]), True
    return found, kept


@settings(max_examples=100, deadline=None)
@given(cases)
def test_tiles_lie_where_a_loop_puts_them(case) -> None:
    tiles, draw = made(case)
    weight = torch.randn(tiles.shape, generator=draw)
    expected, kept = dense(tiles, weight)
    positions, values = tiles.weights()
    assert torch.equal(positions, kept.flatten().nonzero()[:, 0])
    weight.view(-1)[positions] = values.float()
    assert torch.equal(weight.double(), expected)
    assert torch.equal(cut(weight, case["tile"])[tiles.ids], tiles.values.float())
    assert len(cut(weight, case["tile"])) == count_tiles(tiles.shape, case["tile"])
    assert tiles.are_rows == (case["tile"][0] == 1 and case["across"] == 1)


@settings(max_examples=100, deadline=None)
@given(cases, st.booleans())
def test_grids_with_tiles_give_back_their_codes(case, table) -> None:
    tiles, draw = made(case)
    weight = torch.rand(tiles.shape, generator=draw) + 0.5
    base = fit_codebook(weight, NF4, 8) if table else fit_uniform(weight, case["bits"], 3, table)
    grid = KeptGrid(base, *tiles.weights())
    codes = torch.randint(base.low, base.high + 1, tiles.shape, generator=draw).to(torch.int8)
    expected, kept = dense(tiles, base.decode(codes))
    assert torch.equal(grid.decode(codes).double(), expected)
    codes[kept] = grid.encode(grid.decode(codes))[kept]  # as a checkpoint stores them
    assert torch.equal(grid.encode(grid.decode(codes)), codes)
    assert torch.equal(grid.snap(grid.decode(codes)), grid.decode(codes))
    delta = torch.randn(tiles.shape, generator=draw)
    moved = grid.move(codes, delta)
    assert torch.equal(moved[kept], codes[kept])
    assert torch.equal(moved[~kept], base.move(codes, delta)[~kept])


def test_a_tile_must_fill_both_sides() -> None:
    assert fits((6, 8), (3, 8))
    assert not fits((6, 8), (4, 8))
    assert not fits((6, 8), (3, 3))
