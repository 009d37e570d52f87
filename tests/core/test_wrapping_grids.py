"""Properties of the grids above other grids, and of additive codebooks, for widths and odd shapes.

The oracles are loops and sums in float64 over everything a code could stand for.
"""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qresafe.core.additive import AdditiveGrid, wrapped
from qresafe.core.grids import FP4, NF4, CodebookGrid, Grid, UniformGrid, fit_codebook, fit_uniform
from qresafe.core.overlaid import AdaptedGrid, KeptGrid
from qresafe.core.permuted import PermutedGrid

shapes = {"rows": st.integers(1, 7), "columns": st.integers(1, 37), "seed": st.integers(0, 10_000)}
integer_cases = st.fixed_dictionaries(
    shapes
    | {
        "bits": st.integers(2, 8),
        "group_size": st.sampled_from([-1, 0, 3, 8, 64]),
        "symmetric": st.booleans(),
    }
)
table_cases = st.fixed_dictionaries(
    shapes | {"table": st.sampled_from([NF4, FP4]), "block_size": st.sampled_from([8, 64])}
)
cases = st.one_of(integer_cases, table_cases)


def draws(case) -> torch.Generator:
    return torch.Generator().manual_seed(case["seed"])


def weight_of(case, draw: torch.Generator) -> Tensor:
    """Return a weight of both signs without dead groups, magnitudes from 0.5 to 1.5."""
    shape = (case["rows"], case["columns"])
    return (torch.rand(shape, generator=draw) + 0.5) * (
        1 - 2 * torch.randint(2, shape, generator=draw)
    )


def base_of(case, draw: torch.Generator) -> Grid:
    weight = weight_of(case, draw)
    if "table" in case:
        return fit_codebook(weight, case["table"], case["block_size"])
    return fit_uniform(weight, case["bits"], case["group_size"], case["symmetric"])


def codes_on(grid: Grid, draw: torch.Generator) -> Tensor:
    """Return any codes; of FP4's two zeros, 0 and 8, the one that `encode` returns."""
    codes = torch.randint(grid.low, grid.high + 1, grid.code_shape, generator=draw)
    if isinstance(grid, CodebookGrid) and grid.codebook[8] == 0:
        codes[codes == 8] = 0
    return codes.to(torch.int8)


def by_hand(grid: Grid, codes: Tensor) -> Tensor:
    """Return what codes of a uniform or codebook grid stand for, one weight at a time."""
    weight = torch.empty(grid.shape, dtype=torch.float64)
    for row, column in itertools.product(*map(range, grid.shape)):
        code = int(codes[row, column])
        if isinstance(grid, CodebookGrid):
            block = (row * grid.shape[1] + column) // grid.block_size
            weight[row, column] = float(grid.codebook[code]) * float(grid.absmax[block])
            continue
        assert isinstance(grid, UniformGrid)
        at = row % len(grid.scale), column // grid.group_size if grid.group_size > 0 else 0
        weight[row, column] = (code - int(grid.zero[at])) * float(grid.scale[at])
    return weight


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)


def half_steps(grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ends of an integer grid's range, and half a step, of every weight."""
    ends = [grid.decode(torch.full(grid.shape, c, dtype=torch.int8)) for c in (grid.low, grid.high)]
    return ends[0], ends[1], (ends[1] - ends[0]) / (grid.high - grid.low) / 2


@settings(max_examples=100, deadline=None)
@given(integer_cases)
def test_reordered_columns(case) -> None:
    draw = draws(case)
    base = base_of(case, draw)
    order = torch.randperm(case["columns"], generator=draw)
    grid = PermutedGrid(base, order)
    codes = codes_on(grid, draw)
    expected = torch.empty(grid.shape, dtype=torch.float64)
    expected[:, order] = by_hand(base, codes[:, order])
    same(grid.decode(codes), expected)
    assert torch.equal(grid.encode(grid.decode(codes)), codes)
    assert torch.equal(grid.snap(grid.decode(codes)), grid.decode(codes))
    assert torch.equal(grid.move(codes, torch.zeros(grid.shape)), codes)
    low, high, half = half_steps(grid)
    inside = torch.lerp(low, high, torch.rand(grid.shape, generator=draw))
    # 1e-4: rounding of the quotient in float32, for codes up to 255 steps from zero
    assert ((inside - grid.snap(inside)).abs() <= half * (1 + 1e-4)).all()


@settings(max_examples=60, deadline=None)
@given(integer_cases, st.integers(1, 9))
def test_columns_find_their_own_group(case, groups) -> None:
    # g_idx names a group per column, groups of equal size, in any order
    draw = draws(case)
    columns = groups * case["columns"]
    group_of = torch.arange(columns).remainder(groups)[torch.randperm(columns, generator=draw)]
    scale = torch.rand(case["rows"], groups, generator=draw) + 0.5
    zero = torch.zeros(case["rows"], groups, dtype=torch.int8)
    size = case["columns"]
    base = UniformGrid(scale, zero, case["bits"], size, (case["rows"], columns))
    grid = PermutedGrid.by_group(base, group_of)
    codes = codes_on(grid, draw)
    same(grid.decode(codes), codes.double() * scale.double()[:, group_of])


@settings(max_examples=100, deadline=None)
@given(cases, st.integers(1, 5))
def test_an_adapter_on_top(case, rank) -> None:
    draw = draws(case)
    base = base_of(case, draw)
    A = torch.randn(rank, case["columns"], generator=draw) / 10
    B = torch.randn(case["rows"], rank, generator=draw) / 10
    grid = AdaptedGrid(base, A, B, 0.5)
    codes = codes_on(base, draw)
    product = torch.zeros(grid.shape, dtype=torch.float64)
    for r in range(rank):
        product += torch.outer(B[:, r].double(), A[r].double()) / 2
    same(grid.decode(codes), by_hand(base, codes) + product)
    assert torch.equal(grid.encode(grid.decode(codes)), codes)
    assert torch.equal(grid.snap(grid.decode(codes)), grid.decode(codes))
    assert torch.equal(grid.move(codes, torch.zeros(grid.shape)), codes)
    if "bits" in case:
        low, high, half = half_steps(grid)
        inside = torch.lerp(low, high, torch.rand(grid.shape, generator=draw))
        assert ((inside - grid.snap(inside)).abs() <= half * (1 + 1e-4) + 1e-6).all()


@settings(max_examples=100, deadline=None)
@given(cases, st.floats(0, 1))
def test_kept_weights_on_top(case, fraction) -> None:
    draw = draws(case)
    base = base_of(case, draw)
    kept = torch.rand(base.shape, generator=draw) < fraction
    values = torch.randn(int(kept.sum()), generator=draw).half()
    grid = KeptGrid(base, kept.view(-1).nonzero()[:, 0], values)
    codes = codes_on(base, draw)
    # beneath kept weights a checkpoint stores the base's codes of them, since they act on nothing
    codes[kept] = grid.encode(grid.decode(codes))[kept]
    expected = by_hand(base, codes)
    expected[kept] = values.double()
    same(grid.decode(codes), expected)
    assert torch.equal(grid.encode(grid.decode(codes)), codes)
    assert torch.equal(grid.snap(grid.decode(codes)), grid.decode(codes))
    delta = torch.randn(grid.shape, generator=draw)
    moved = grid.move(codes, delta)
    assert torch.equal(moved[kept], codes[kept])
    assert torch.equal(moved[~kept], base.move(codes, delta)[~kept])
    if "bits" in case:
        low, high, half = half_steps(base)
        inside = torch.lerp(low, high, torch.rand(grid.shape, generator=draw))
        off = (inside - grid.snap(inside)).abs()
        assert (off <= half * (1 + 1e-4))[~kept].all()


additive_cases = st.fixed_dictionaries(
    {
        "books": st.integers(1, 4),
        "bits": st.integers(1, 12),
        "group": st.integers(1, 9),
        "rows": st.integers(1, 4),
        "groups": st.integers(1, 5),
        "seed": st.integers(0, 10_000),
    }
).filter(lambda case: case["books"] * case["bits"] <= 12)


def every_sum(books: Tensor) -> tuple[Tensor, Tensor]:
    """Return all tuples of indices (n, M), and in float64 what each stands for (n, group)."""
    every = torch.cartesian_prod(*[torch.arange(books.shape[1])] * len(books))
    every = every.view(-1, len(books))
    sums = torch.zeros(len(every), books.shape[2], dtype=torch.float64)
    for m in range(len(books)):
        sums += books[m].double()[every[:, m]]
    return every, sums


def positional(case, draw: torch.Generator) -> Tensor:
    """Return codebooks whose sums are whole numbers, all of them different.

    Book m holds the odd digits -(K - 1) .. K - 1 times K^(M - 1 - m), in any order, along one
    direction: sums are at most K^M - 1 = 4095, 2 apart, so their squares are exact in float32.
    """
    count = 1 << case["bits"]
    direction = 1.0 - 2 * torch.randint(2, (case["group"],), generator=draw)
    digits = [2.0 * torch.randperm(count, generator=draw) - count + 1 for _ in range(case["books"])]
    powers = [float(count ** (case["books"] - 1 - m)) for m in range(case["books"])]
    return torch.stack([d[:, None] * p * direction for d, p in zip(digits, powers, strict=True)])


def additive(case, books: Tensor, draw: torch.Generator) -> tuple[AdditiveGrid, Tensor]:
    scales = torch.rand(case["rows"], 1, generator=draw) + 0.5
    shape = (case["rows"], case["groups"] * case["group"])
    grid = AdditiveGrid(books, scales, case["bits"], shape)
    indices = torch.randint(1 << case["bits"], grid.code_shape, generator=draw)
    return grid, wrapped(indices, case["bits"])


@settings(max_examples=80, deadline=None)
@given(additive_cases)
def test_sums_of_vectors_give_back_their_codes(case) -> None:
    draw = draws(case)
    grid, codes = additive(case, positional(case, draw), draw)
    expected = torch.zeros(grid.shape, dtype=torch.float64)
    for row, group, m in itertools.product(*map(range, grid.code_shape)):
        index = int(codes[row, group, m]) % (1 << case["bits"])
        place = slice(group * case["group"], (group + 1) * case["group"])
        expected[row, place] += grid.codebooks[m, index].double() * float(grid.scales[row])
    same(grid.decode(codes), expected)
    assert torch.equal(grid.encode(grid.decode(codes)), codes)
    assert torch.equal(grid.snap(grid.decode(codes)), grid.decode(codes))
    assert torch.equal(grid.move(codes, torch.zeros(grid.shape)), codes)


@settings(max_examples=80, deadline=None)
@given(additive_cases)
def test_the_nearest_sum_is_found_where_that_is_promised(case) -> None:
    draw = draws(case)
    books = torch.randn(case["books"], 1 << case["bits"], case["group"], generator=draw)
    grid, _ = additive(case, books, draw)
    weight = torch.randn(grid.shape, generator=draw)
    targets = (weight.double() / grid.scales.double()).view(-1, case["group"])
    nearest = torch.cdist(targets, every_sum(books)[1]).amin(1)
    found = (grid.snap(weight).double() / grid.scales.double()).view(-1, case["group"])
    reached = (targets - found).norm(dim=1)
    assert (reached >= nearest - 1e-5).all()
    if case["books"] == 1 or (case["books"] == 2 and case["bits"] <= 8):
        # 1e-3: squared distances in float32, of vectors about 4 long
        assert (reached <= nearest + 1e-3).all()
