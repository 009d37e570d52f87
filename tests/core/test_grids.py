"""Grids against compressed-tensors and bitsandbytes, and the properties that patches rely on."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st

from qresafe.core.grids import (
    FP4,
    NF4,
    CodebookGrid,
    QuantizedTensor,
    UniformGrid,
    fit_codebook,
    fit_uniform,
    straight_through,
)

uniform_cases = st.fixed_dictionaries(
    {
        "bits": st.integers(2, 8),
        "group_size": st.sampled_from([-1, 0, 3, 8, 64]),
        "symmetric": st.booleans(),
        "rows": st.integers(1, 9),
        "columns": st.integers(1, 37),
        "seed": st.integers(0, 10_000),
    }
)


def _weight(case):
    generator = torch.Generator().manual_seed(case["seed"])
    return torch.randn(case["rows"], case["columns"], generator=generator)


def _grid(case) -> tuple[torch.Tensor, UniformGrid]:
    weight = _weight(case)
    return weight, fit_uniform(weight, case["bits"], case["group_size"], case["symmetric"])


def _any_codes(case) -> torch.Tensor:
    generator = torch.Generator().manual_seed(case["seed"] + 1)
    half = 1 << (case["bits"] - 1)
    shape = (case["rows"], case["columns"])
    return torch.randint(-half, half, shape, generator=generator, dtype=torch.int8)


def _arguments(bits, group_size, symmetric):
    strategy = {-1: "channel", 0: "tensor"}.get(group_size, "group")
    size = group_size if strategy == "group" else None
    return QuantizationArgs(
        num_bits=bits, strategy=strategy, group_size=size, symmetric=symmetric, zp_dtype=torch.int8
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 0, 16])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_compressed_tensors_agrees_to_the_bit(bits, group_size, symmetric, dtype):
    weight = torch.randn(24, 48, generator=torch.Generator().manual_seed(bits)).to(dtype)
    weight[3] = 0  # a dead row: its scale must not be 0
    arguments = _arguments(bits, group_size, symmetric)
    grid = fit_uniform(weight, bits, group_size, symmetric)
    groups = (
        weight.reshape(1, 1, -1)
        if group_size == 0
        else weight.unflatten(1, (-1, 48 if group_size == -1 else group_size))
    )
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    assert torch.equal(grid.scale, scale)
    assert torch.equal(grid.zero, zero)

    codes = quantize(weight.float(), scale.float(), zero, arguments, dtype=torch.int8)
    assert torch.equal(grid.encode(weight), codes)
    theirs = dequantize(codes, scale, zero, arguments)
    assert theirs.dtype == dtype
    assert torch.equal(grid.decode(codes), theirs)


@settings(max_examples=150, deadline=None)
@given(uniform_cases)
def test_uniform_round_trips_and_stays_within_half_a_step(case):
    weight, grid = _grid(case)
    codes = _any_codes(case)
    assert torch.equal(grid.encode(grid.decode(codes)), codes)
    assert torch.equal(grid.snap(grid.decode(codes)), grid.decode(codes))
    bottom = grid.decode(torch.full_like(codes, grid.low))
    top = grid.decode(torch.full_like(codes, grid.high))
    step = grid.decode(torch.full_like(codes, grid.low + 1)) - bottom
    inside = weight.clamp(bottom, top)
    # 1e-4: rounding of the quotient in float32, for codes up to 255 steps from zero.
    assert ((inside - grid.snap(inside)).abs() <= step * (0.5 + 1e-4)).all()


@settings(max_examples=60, deadline=None)
@given(uniform_cases, st.sampled_from([torch.bfloat16, torch.float16]))
def test_low_precision_scales_still_round_trip(case, dtype):
    if dtype == torch.bfloat16 and case["bits"] == 8:
        case |= {"symmetric": True}  # see the class's docstring; `move` covers the other
    _, grid = _grid(case)
    grid, codes = grid.to(dtype=dtype), _any_codes(case)
    assert torch.equal(grid.encode(grid.decode(codes)), codes)
    assert grid.snap(grid.decode(codes)).dtype == dtype


@settings(max_examples=80, deadline=None)
@given(uniform_cases, st.sampled_from([torch.float32, torch.bfloat16]))
def test_move_keeps_codes_and_equals_encoding_the_moved_weight(case, dtype):
    _, grid = _grid(case)
    grid, codes = grid.to(dtype=dtype), _any_codes(case)
    assert torch.equal(grid.move(codes, torch.zeros(grid.shape)), codes)
    # By whole and quarter steps: both ways of computing agree away from the rounding boundary.
    steps = torch.randint(-8, 9, grid.shape, generator=torch.Generator().manual_seed(3)) + 0.25
    size = grid.decode(codes.clone().fill_(1)).float() - grid.decode(codes.clone().fill_(0)).float()
    expected = (codes + steps).clamp(grid.low, grid.high).round().to(torch.int8)
    if dtype == torch.float32:  # in bfloat16 the difference above is not the step itself
        assert torch.equal(grid.move(codes, steps * size), expected)
    moved = grid.snap_moved_(codes, (steps * size).clone())
    assert torch.equal(moved.to(dtype), grid.decode(grid.move(codes, steps * size)))


@settings(max_examples=30, deadline=None)
@given(uniform_cases)
def test_row_blocks_of_a_grid_decode_to_the_rows(case):
    _, grid = _grid(case)
    codes, half = _any_codes(case), slice(case["rows"] // 2, case["rows"])
    assert torch.equal(grid.rows(half).decode(codes[half]), grid.decode(codes)[half])


def test_llm_int8_rows_are_a_symmetric_grid():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(6, 10, dtype=torch.float16)
    codes, row_max, _ = functional.int8_vectorwise_quant(weight)
    scale = row_max[:, None].float() / 127
    grid = UniformGrid(scale, torch.zeros(6, 1, dtype=torch.int8), 8, -1, (6, 10))
    theirs = functional.int8_vectorwise_dequant(codes, row_max)
    torch.testing.assert_close(grid.decode(codes), theirs, rtol=1e-6, atol=0)
    assert torch.equal(grid.encode(theirs), codes)


@pytest.mark.parametrize(("name", "table"), [("nf4", NF4), ("fp4", FP4)])
def test_tables_are_bitsandbytes(name, table):
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.get_4bit_type(name, device="cpu")
    assert torch.equal(torch.tensor(table, dtype=torch.float32), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "table"), [("nf4", NF4), ("fp4", FP4)])
@pytest.mark.parametrize("shape", [(8, 64), (5, 96), (3, 50)])  # 3 * 50 has a short last block
def test_codebook_decodes_like_bitsandbytes(name, table, shape, dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=name)
    pairs = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1)
    codes = pairs.flatten()[: weight.numel()].view(shape).to(torch.int8)
    grid = fit_codebook(weight, table, 64)
    assert torch.equal(grid.absmax, state.absmax)
    theirs = _bitsandbytes_dequantize(packed, state)
    assert torch.equal(grid.decode(codes), theirs)
    if shape[1] % 64 == 0:
        assert torch.equal(functional.dequantize_4bit(packed, state), theirs)
    # Same values as bitsandbytes' own rounding (FP4 has two codes for 0), but near a midpoint,
    # where its kernel compares with rounded constants.
    differing = (grid.decode(grid.encode(weight)) != theirs).float().mean()
    assert differing < 0.02


def _bitsandbytes_dequantize(packed, state):
    # The portable version: bitsandbytes 0.50.2's CPU kernel takes the wrong block's absmax in
    # rows that are no multiple of the block (a 352-wide row in blocks of 64 is off by 2.4).
    from bitsandbytes.backends.default import ops

    compute = ops._dequantize_4bit_compute.__wrapped__
    packed = packed.reshape(-1)
    return compute(packed, state.absmax, state.code, state.blocksize, state.shape, state.dtype)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([NF4, FP4]), st.integers(1, 7), st.integers(1, 40), st.sampled_from([8, 64]))
def test_codebook_round_trips(table, rows, columns, block_size):
    generator = torch.Generator().manual_seed(rows * columns)
    weight = torch.randn(rows, columns, generator=generator)
    grid = fit_codebook(weight, table, block_size)
    codes = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.int8)
    values = grid.decode(codes)
    assert torch.equal(grid.snap(values), values)
    assert torch.equal(grid.decode(grid.encode(values)), values)
    if table is NF4:  # FP4's two zeros cannot be told apart by value ...
        assert torch.equal(grid.encode(values), codes)
    assert torch.equal(grid.move(codes, torch.zeros(rows, columns)), codes)  # ... but here
    nearest = (weight.unsqueeze(-1) - _levels(grid, rows, columns)).abs().amin(-1)
    torch.testing.assert_close((weight - grid.snap(weight)).abs(), nearest, rtol=1e-5, atol=1e-6)


def _levels(grid: CodebookGrid, rows: int, columns: int) -> torch.Tensor:
    levels = [grid.decode(torch.full((rows, columns), i, dtype=torch.int8)) for i in range(16)]
    return torch.stack(levels, dim=-1)


def test_codebook_row_blocks_and_dead_blocks():
    weight = torch.randn(8, 24)
    weight[:4] = 0
    grid = fit_codebook(weight, NF4, 16)
    codes = grid.encode(weight)
    assert torch.equal(grid.decode(codes)[:4], weight[:4])
    assert grid.row_step == 2  # 16 / gcd(16, 24): two rows are three blocks
    for block in (slice(0, 2), slice(4, 8)):
        assert torch.equal(grid.rows(block).decode(codes[block]), grid.decode(codes)[block])


def test_straight_through_snaps_forward_and_passes_the_gradient():
    weight = torch.tensor([[0.0, 0.4, 0.6, 9.0]], requires_grad=True)
    grid = UniformGrid(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int8), 3, -1, (1, 4))
    snapped = straight_through(weight, grid)
    assert snapped.tolist() == [[0.0, 0.0, 1.0, 3.0]]  # 9 is beyond the 3-bit range [-4, 3]
    (snapped * torch.tensor([[1.0, 2.0, 3.0, 4.0]])).sum().backward()
    assert weight.grad.tolist() == [[1.0, 2.0, 3.0, 4.0]]


def test_quantized_tensor_is_grid_plus_codes():
    weight = torch.randn(4, 8)
    grid = fit_uniform(weight, 8, -1, False)
    assert torch.equal(QuantizedTensor(grid, grid.encode(weight)).dense(), grid.snap(weight))
