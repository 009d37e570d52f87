"""Additive codebooks: decoding, and searches against every possible combination of codes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from qresafe.core.additive import AdditiveGrid, repeated, residual_codes, search, wrapped


def random_grid(
    books: int, bits: int, group: int, rows: int = 3, groups: int = 5
) -> tuple[AdditiveGrid, Tensor]:
    """Return a grid and codes drawn at random."""
    draw = torch.Generator().manual_seed(books + bits)
    codebooks = torch.randn(books, 1 << bits, group, generator=draw)
    scales = torch.rand(rows, 1, generator=draw) + 0.5
    indices = torch.randint(1 << bits, (rows, groups, books), generator=draw)
    return AdditiveGrid(codebooks, scales, bits, (rows, groups * group)), wrapped(indices, bits)


def test_the_arithmetic_of_one_row() -> None:
    # Two codebooks of four vectors; index 3 is stored as 3 - 4 = -1, index 2 as -2.
    books = torch.tensor([[[0, 0], [1, 0], [2, 0], [3, 0]], [[0, 0], [0, 1], [0, 2], [5, 5]]])
    grid = AdditiveGrid(books.float(), torch.tensor([[10.0]]), 2, (1, 4))
    codes = torch.tensor([[[-1, 1], [1, -2]]], dtype=torch.int8)
    assert (grid.code_shape, grid.low, grid.high) == ((1, 2, 2), -2, 1)
    assert grid.decode(codes).tolist() == [[30, 10, 10, 20]]  # ([3,0]+[0,1])*10, ([1,0]+[0,2])*10
    assert torch.equal(grid.encode(grid.decode(codes)), codes)
    moved = grid.move(codes, torch.tensor([[0.0, 9.0, 0.0, 0.0]]))
    assert moved.tolist() == [[[-1, -2], [1, -2]]]  # [30, 19] is nearest to [30, 20]


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize(("books", "bits"), [(1, 3), (1, 8), (2, 4), (2, 8), (1, 12)])
def test_encoding_a_decoded_weight_gives_its_codes(books: int, bits: int, group: int) -> None:
    grid, codes = random_grid(books, bits, group)
    decoded = grid.decode(codes)
    again = grid.encode(decoded)
    # With groups of one weight, other codes may stand for the very same value to 7 digits.
    torch.testing.assert_close(
        grid.decode(again), decoded, atol=2e-3 if group == 1 else 1e-5, rtol=0
    )
    assert group < 8 or torch.equal(again, codes)
    assert again.dtype == (torch.int8 if bits <= 8 else torch.int16)


@pytest.mark.parametrize(("books", "bits"), [(1, 3), (2, 3), (3, 2)])
def test_searches_against_every_combination(books: int, bits: int) -> None:
    grid, _ = random_grid(books, bits, 4, rows=6)
    targets = torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
    every = torch.tensor(list(itertools.product(range(1 << bits), repeat=books)))
    sums = sum(grid.codebooks[m][every[:, m]] for m in range(books))
    nearest = torch.cdist(targets, sums).amin(1)
    start = residual_codes(targets, grid.codebooks)
    found = search(targets, start, grid.codebooks, beam=1 << (bits * (books - 1)), sweeps=1)
    reached = sum(grid.codebooks[m][found[:, m]] for m in range(books))
    torch.testing.assert_close((targets - reached).norm(dim=1), nearest)


def test_hypotheses_that_differ_in_one_codebook_alone_are_found() -> None:
    """Of three codebooks, m = 1 is free: (5, *, 7) comes three times, and the first one stays.

    The codes fill 16 bits, so that no small product tells hypotheses apart by luck.
    """
    beams = torch.tensor([[[5, 1, 7], [7, 1, 5], [5, 2, 7], [65535, 0, 65534], [5, 1, 7]]])
    assert repeated(beams, 1)[0, :, 0].tolist() == [False, False, True, False, True]
    assert repeated(beams, 0)[0, :, 0].tolist() == [False, False, False, False, True]
    many = torch.randint(3, (50, 12, 4), generator=torch.Generator().manual_seed(0))
    for m in range(4):
        for hypotheses, again in zip(many, repeated(many, m)[..., 0].tolist(), strict=True):
            rest = [tuple(h[:m].tolist() + h[m + 1 :].tolist()) for h in hypotheses]
            assert again == [one in rest[:i] for i, one in enumerate(rest)]


@pytest.mark.parametrize(("books", "bits"), [(1, 8), (2, 4), (4, 4), (1, 10)])
def test_a_move_touches_only_groups_with_a_change(books: int, bits: int) -> None:
    grid, codes = random_grid(books, bits, 8, rows=4)
    delta = torch.zeros(grid.shape)
    delta[1, 9] = 5.0  # row 1, second group
    delta[2, 39] = 1e-4  # too little to leave the present point
    moved = grid.move(codes, delta)
    assert (moved != codes).any(2).nonzero().tolist() == [[1, 1]]
    assert torch.equal(grid.snap_moved_(codes, delta.clone()), grid.decode(moved))
    target = grid.decode(codes) + delta
    assert (grid.decode(moved) - target).norm() < (grid.decode(codes) - target).norm()
    assert torch.equal(grid.move(codes, torch.zeros(grid.shape)), codes)


def test_codes_that_share_a_vector_stay_where_nothing_changes() -> None:
    grid = AdditiveGrid(torch.ones(2, 4, 2), torch.ones(1, 1), 2, (1, 2))
    codes = torch.tensor([[[1, -1]]], dtype=torch.int8)
    assert torch.equal(grid.move(codes, torch.full((1, 2), 0.1)), codes)


def test_rows_of_a_grid_are_those_of_the_whole() -> None:
    grid, codes = random_grid(2, 4, 8, rows=5)
    part = slice(1, 4)
    delta = torch.randn(grid.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(grid.rows(part).decode(codes[part]), grid.decode(codes)[part])
    assert torch.equal(
        grid.rows(part).move(codes[part], delta[part]), grid.move(codes, delta)[part]
    )
    assert grid.to(dtype=torch.bfloat16).decode(codes).dtype == torch.bfloat16
