"""Packed codes against a string of bits, and layers that hold them against dense ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qresafe.core.additive import AdditiveGrid
from qresafe.core.grids import NF4, Grid, QuantizedTensor, UniformGrid, fit_codebook, fit_uniform
from qresafe.core.masked_lora import attach, attach_frozen
from qresafe.core.packed import code_bits, pack_codes, unpack_codes


def uniform(bits: int, rows: int, columns: int) -> UniformGrid:
    zero = torch.zeros(rows, 1, dtype=torch.int8)
    return UniformGrid(torch.ones(rows, 1), zero, bits, -1, (rows, columns))


def codes_of(grid: Grid, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(grid.low, grid.high + 1, grid.code_shape, generator=draw).to(torch.int8)


@settings(max_examples=200, deadline=None)
@given(
    bits=st.integers(2, 8), rows=st.integers(1, 6), columns=st.integers(1, 37), seed=st.integers(0)
)
def test_what_was_packed_comes_back_whole_and_by_rows(
    bits: int, rows: int, columns: int, seed: int
) -> None:
    grid = uniform(bits, rows, columns)
    codes = codes_of(grid, seed % 10_000)
    packed = pack_codes(codes, grid)
    # Fields of 4, 2 and 1 bit fill whole bytes of a row, each on its own.
    fields = [field for field in (4, 2, 1) if bits & field] or [8]
    assert packed.shape == (rows, sum(-(-columns * field // 8) for field in fields))
    assert torch.equal(unpack_codes(packed, grid), codes)
    for block in (slice(0, rows // 2), slice(rows // 2, rows)):
        assert torch.equal(unpack_codes(packed[block], grid.rows(block)), codes[block])


def test_three_bits_are_two_and_one_by_hand() -> None:
    grid = uniform(3, 1, 5)
    codes = torch.tensor([[-4, -1, 3, 0, 2]], dtype=torch.int8)
    # From 0: 0, 3, 7, 4, 6 = 000, 011, 111, 100, 110 in bits.
    low = [0b00_11_11_00, 0b00_00_00_10]  # the lower two, first code lowest: 00 11 11 00 | 10
    high = [0b000_1_1_1_0_0]  # the upper one: 0 0 1 1 1
    assert pack_codes(codes, grid).tolist() == [low + high]


def test_codes_that_stand_for_groups_are_packed_too() -> None:
    grid = AdditiveGrid(torch.randn(2, 32, 4), torch.ones(3, 1), 5, (3, 28))
    codes = codes_of(grid, 0)
    packed = pack_codes(codes, grid)
    assert packed.shape == (3, 7 + 2)  # 14 codes of 4 bits, and of 1
    assert torch.equal(unpack_codes(packed, grid), codes)


def test_eight_bits_lie_as_they_are() -> None:
    grid = uniform(8, 2, 3)
    codes = codes_of(grid, 0)
    assert code_bits(grid) == 8
    assert pack_codes(codes, grid) is codes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("table", [False, True])
def test_a_frozen_layer_computes_as_its_decoded_weight(table: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, weight = nn.Sequential(nn.Linear(48, 20)).to(dtype), torch.randn(20, 48)
    grid = fit_codebook(weight, NF4, 64) if table else fit_uniform(weight, 4, 16, False)
    tensor = QuantizedTensor(grid, grid.encode(weight))
    inputs, bias = torch.randn(3, 48, dtype=dtype), model[0].bias
    expected = nn.functional.linear(inputs, tensor.dense().to(dtype), bias)
    (layer,) = attach_frozen(model, {"0": tensor}).values()
    assert torch.equal(model(inputs), expected)
    assert not list(layer.trained)
    assert layer.packed.nbytes == 20 * 48 / 2  # 4 bits a weight
    assert layer.weight.nbytes == 0


@pytest.mark.parametrize("through_grid", [True, False])
def test_a_layer_keeps_its_decoded_weight_only_where_it_is_added_to(through_grid: bool) -> None:
    model, weight = nn.Sequential(nn.Linear(16, 8)), torch.randn(8, 16)
    grid = fit_uniform(weight, 4, 16, False)
    given_ = {"0": QuantizedTensor(grid, grid.encode(weight))}
    options = {"rank": 2, "alpha": 4, "on": "weight", "seed": 0}
    (layer,) = attach(model, given_, through_grid=through_grid, **options).values()  # type: ignore[arg-type]
    assert layer.weight.numel() == (0 if through_grid else 8 * 16)
    assert torch.equal(layer.effective_weight(), given_["0"].dense())
    assert "weight" not in layer.state()
