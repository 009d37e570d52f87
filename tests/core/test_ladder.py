"""The neighbour of a code is the next level by value, on every grid; told apart from its tables."""

from __future__ import annotations

import pytest
import torch

from qresafe.core.additive import AdditiveGrid
from qresafe.core.fp8 import Fp8Grid
from qresafe.core.grids import FP4, NF4, CodebookGrid, Grid, UniformGrid, fit_codebook, fit_uniform
from qresafe.core.ladder import ladder_of
from qresafe.core.overlaid import AdaptedGrid, KeptGrid
from qresafe.core.permuted import PermutedGrid
from qresafe.errors import ModelError

ONE_SCALE = torch.ones(1, 1)


def one_by_one(grid: Grid, skip: tuple[int, ...] = ()) -> None:
    """Compare with the definition, code by code: the nearest of all smaller and larger values."""
    codes = [code for code in range(grid.low, grid.high + 1) if code not in skip]
    value = {c: float(grid.decode(torch.tensor([[c]], dtype=torch.int8))) for c in codes}
    ladder = ladder_of(grid)
    for code in codes:
        at = torch.tensor([[code]], dtype=torch.int8)
        smaller = [v for v in value.values() if v < value[code]]
        larger = [v for v in value.values() if v > value[code]]
        assert value[int(ladder.down(at))] == (max(smaller) if smaller else value[code])
        assert value[int(ladder.up(at))] == (min(larger) if larger else value[code])
        if not smaller:
            assert int(ladder.down(at)) == code  # an end is its own neighbour, not its twin's
        if not larger:
            assert int(ladder.up(at)) == code


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_uniform_codes_by_number(bits: int) -> None:
    zero = torch.zeros(1, 1, dtype=torch.int8)
    one_by_one(UniformGrid(ONE_SCALE, zero, bits, 0, (1, 1)))


@pytest.mark.parametrize("table", [NF4, FP4], ids=["nf4", "fp4"])
def test_codebook_codes_by_value(table: tuple[float, ...]) -> None:
    one_by_one(CodebookGrid(torch.tensor(table), torch.ones(1), 64, (1, 1)))


def test_fp4_written_out() -> None:
    """In bitsandbytes' order: 0, .0052, .667, 1, .333, .5, .167, .25, then the same below 0."""
    ladder = ladder_of(CodebookGrid(torch.tensor(FP4), torch.ones(1), 64, (1, 1)))
    codes = torch.tensor([0, 8, 1, 9, 3, 11], dtype=torch.int8)
    # Both zeros go up to .0052 (1) and down to -.0052 (9); what arrives at 0 arrives at code 0.
    assert ladder.up(codes).tolist() == [1, 1, 6, 0, 3, 10]
    assert ladder.down(codes).tolist() == [9, 9, 0, 14, 2, 11]


def test_fp8_codes_by_value_without_nan() -> None:
    grid = Fp8Grid(ONE_SCALE, 0, (1, 1))
    one_by_one(grid, skip=(-1,))  # NaN's pattern; 127 is beyond `high`
    ladder = ladder_of(grid)
    codes = torch.arange(-128, 127, dtype=torch.int8)
    reached = torch.cat([ladder.up(codes[codes != -1]), ladder.down(codes[codes != -1])])
    assert not ((reached == -1) | (reached == 127)).any()


def test_what_lies_above_a_grid_does_not_change_its_ladder() -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    uniform = fit_uniform(weight, 4, 4, False)
    wrapped: list[Grid] = [
        PermutedGrid(uniform, torch.randperm(8)),
        AdaptedGrid(uniform, torch.randn(2, 8), torch.randn(4, 2), 1.0),
        KeptGrid(PermutedGrid(uniform, torch.arange(8)), torch.tensor([3]), torch.tensor([9.0])),
    ]
    codes = uniform.encode(weight)
    for grid in wrapped:
        assert torch.equal(ladder_of(grid).up(codes), ladder_of(uniform).up(codes))
    nf4 = ladder_of(fit_codebook(weight, NF4, 4))
    assert nf4.up(torch.tensor([7], dtype=torch.int8)).tolist() == [8]


def test_codes_of_several_weights_are_refused_in_words() -> None:
    grid = AdditiveGrid(torch.randn(1, 4, 2), torch.ones(4, 1), 2, (4, 8))
    with pytest.raises(ModelError, match=r"no neighbours to flip to in layer 'q'.*masked_lora"):
        ladder_of(grid, "layer 'q'")
