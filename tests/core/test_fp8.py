"""8-bit floats against torch's own cast and compressed-tensors' dequantization."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from qresafe.core.fp8 import E4M3, Fp8Grid, levels
from qresafe.core.sparse_patch import diff

ALL = torch.arange(-128, 128).to(torch.int8)
NUMBERS = ALL[(ALL != 127) & (ALL != -1)]  # 0x7f and 0xff are NaN

cases = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 7),
        "columns": st.integers(1, 37),
        "group_size": st.sampled_from([-1, 0, 3, 8, 64]),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
        "seed": st.integers(0, 10_000),
    }
)


def made(case) -> tuple[Fp8Grid, torch.Tensor, torch.Generator]:
    """Return a grid with scales between 2^-9 and 2^-1, and random codes of numbers."""
    draw = torch.Generator().manual_seed(case["seed"])
    shape = (case["rows"], case["columns"])
    width = shape[1] if case["group_size"] <= 0 else case["group_size"]
    size = (1 if case["group_size"] == 0 else shape[0], -(-shape[1] // width))
    scale = 2.0 ** (-9 + 8 * torch.rand(size, generator=draw))
    codes = NUMBERS[torch.randint(len(NUMBERS), shape, generator=draw)]
    return Fp8Grid(scale.to(case["dtype"]), case["group_size"], shape), codes, draw


def spread(grid: Fp8Grid) -> torch.Tensor:
    """Return the scale of every weight, written out by hand."""
    width = grid.shape[1] if grid.group_size <= 0 else grid.group_size
    columns = grid.scale.float().repeat_interleave(width, 1)[:, : grid.shape[1]]
    return columns.expand(grid.shape)


def test_codes_are_the_bits_of_the_floats() -> None:
    # 0x38 = 0 0111 000: exponent 7 - 7, mantissa 0: 1.0; 0x7e is the largest; 0x01 is 2^-9.
    codes = torch.tensor([[0x38, 0x7E, 0x01, -128]], dtype=torch.int8)
    grid = Fp8Grid(torch.tensor([[2.0]]), -1, (1, 4))
    assert grid.decode(codes).tolist() == [[2.0, 896.0, 2.0**-8, -0.0]]
    assert int((levels(ALL).float().isnan()).sum()) == 2
    assert torch.equal(ALL[levels(ALL).float().isnan()], torch.tensor([-1, 127]).to(torch.int8))


@settings(max_examples=150, deadline=None)
@given(cases)
def test_every_code_survives_decoding(case) -> None:
    grid, codes, _ = made(case)
    assert grid.decode(codes).dtype == case["dtype"]
    assert torch.equal(grid.encode(grid.decode(codes)), codes)
    assert torch.equal(grid.snap(grid.decode(codes)), grid.decode(codes))
    assert torch.equal(grid.move(codes, torch.zeros(grid.shape)), codes)


@settings(max_examples=150, deadline=None)
@given(cases)
def test_encoding_is_torchs_cast_and_never_nan(case) -> None:
    grid, _, draw = made(case)
    weight = 300 * torch.randn(grid.shape, generator=draw) ** 3 * spread(grid)  # often too large
    weight[0, 0] = float("inf")
    codes = grid.encode(weight)
    expected = (weight / spread(grid)).clamp(-448, 448).to(E4M3)
    assert torch.equal(levels(codes).float(), expected.float())
    assert not levels(codes).float().isnan().any()
    assert (grid.low <= codes).all()
    assert (codes <= grid.high).all()


@settings(max_examples=100, deadline=None)
@given(cases)
def test_the_nearest_level_is_chosen(case) -> None:
    grid, _, draw = made(case)
    scaled = 100 * torch.randn(grid.shape, generator=draw)
    near = levels(grid.encode(scaled * spread(grid))).float()
    table = levels(NUMBERS).float()
    best = (scaled[..., None] - table).abs().amin(-1)
    # 1e-5: scaling and unscaling by a float32 that is no power of two
    assert ((scaled - near).abs() <= best * (1 + 1e-5) + scaled.abs() * 1e-6).all()


@settings(max_examples=150, deadline=None)
@given(cases)
def test_moves_are_nearest_and_keep_what_does_not_change(case) -> None:
    grid, codes, draw = made(case)
    delta = torch.randn(grid.shape, generator=draw) * spread(grid) * 20
    delta[torch.rand(grid.shape, generator=draw) < 0.5] = 0
    moved = grid.move(codes, delta)
    assert torch.equal(moved[delta == 0], codes[delta == 0])
    target = (levels(codes).float() + delta / spread(grid)).clamp(-448, 448).to(E4M3).float()
    assert torch.equal(levels(moved).float(), target)
    same = target == levels(codes).float()
    assert torch.equal(moved[same], codes[same])  # -0 and 0 alike
    buffer = delta.clone()
    snapped = grid.snap_moved_(codes, buffer)
    assert snapped is buffer
    assert torch.equal(snapped, grid.to(dtype=torch.float32).decode(moved))


@settings(max_examples=60, deadline=None)
@given(cases)
def test_patches_of_bit_patterns_apply_and_revert(case) -> None:
    grid, codes, draw = made(case)
    moved = grid.move(codes, torch.randn(grid.shape, generator=draw))
    change = diff(codes, moved)
    assert torch.equal(change.apply(codes), moved)
    assert torch.equal(change.revert(moved), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_size", [-1, 0, 16])
def test_compressed_tensors_agrees_to_the_bit(group_size: int, dtype: torch.dtype) -> None:
    strategy = {-1: "channel", 0: "tensor"}.get(group_size, "group")
    args = QuantizationArgs(
        num_bits=8,
        type="float",
        strategy=strategy,
        group_size=group_size if group_size > 0 else None,
        symmetric=True,
    )
    case = {"rows": 12, "columns": 48, "group_size": group_size, "dtype": dtype, "seed": 3}
    grid, codes, draw = made(case)
    assert torch.equal(grid.decode(codes), dequantize(levels(codes), grid.scale, None, args))
    weight = torch.randn(grid.shape, generator=draw) * spread(grid) * 50
    theirs = quantize(weight, grid.scale.float(), None, args, dtype=E4M3)
    assert torch.equal(levels(grid.encode(weight)).float(), theirs.float())


def test_blocks_of_rows_are_grids_too() -> None:
    for group_size in (-1, 0, 8):
        case = {"rows": 6, "columns": 24, "group_size": group_size, "dtype": torch.float32}
        grid, codes, _ = made(case | {"seed": 1})
        block = grid.rows(slice(2, 5))
        assert block.shape == (3, 24)
        assert torch.equal(block.decode(codes[2:5]), grid.decode(codes)[2:5])


def test_a_dead_group_gets_a_code_of_zero() -> None:
    grid = Fp8Grid(torch.tensor([[0.0], [1.0]]), -1, (2, 3))
    codes = grid.encode(torch.zeros(2, 3))
    assert torch.equal(grid.decode(codes), torch.zeros(2, 3))
