"""Sparse code differences: round trips, their size, and damaged files."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qresafe.core.sparse_patch import SparseDiff, diff, unpack
from qresafe.errors import CorruptArtifactError


def _pair(bits, size, density, seed, widest=256):
    """Random codes of a width, a share of them changed by at most `widest` steps."""
    generator = torch.Generator().manual_seed(seed)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    old = torch.randint(low, high + 1, (size,), generator=generator)
    up = torch.minimum(high - old, torch.tensor(widest))
    down = torch.minimum(old - low, torch.tensor(widest))
    # One of the up + down steps that stay in range and are not 0.
    step = (torch.rand(size, generator=generator) * (up + down)).long() - down
    step = torch.where(step >= 0, step + 1, step)
    changed = torch.randperm(size, generator=generator)[: round(size * density)]
    new = old.clone()
    new[changed] += step[changed]
    return old.to(torch.int8), new.to(torch.int8)


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 8), st.integers(1, 700), st.floats(0, 1), st.integers(0, 999))
def test_apply_and_revert_round_trip(bits, size, density, seed):
    old, new = _pair(bits, size, density, seed)
    packed = diff(old, new).pack()
    assert all(tensor.dtype == torch.uint8 and tensor.dim() == 1 for tensor in packed.values())
    again = unpack(packed)
    assert torch.equal(again.apply(old), new)
    assert torch.equal(again.revert(new), old)


def test_matrices_keep_their_shape_and_the_argument():
    old = torch.zeros(3, 4, dtype=torch.int8)
    new = old.clone()
    new[2, 1] = -128
    change = diff(old, new)
    assert change.positions.tolist() == [9]
    assert torch.equal(change.apply(old), new)
    assert not old.any()


@pytest.mark.parametrize("density", [1e-4, 1e-3, 0.01, 0.05])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_at_most_two_and_a_half_bytes_per_changed_code(bits, density):
    # Changes of up to 7 steps, as patches make them; wider ones cost one byte more each.
    old, new = _pair(bits, 1_000_000, density, seed=5, widest=7)
    change = diff(old, new)
    packed = change.pack()
    assert len(change.positions) == density * 1_000_000
    body = sum(tensor.numel() for name, tensor in packed.items() if name != "header")
    assert body <= 2.5 * len(change.positions)


def test_the_arithmetic_of_a_packed_patch():
    # 5 changes among 160 codes: l = log2(160 / 5) = 5 lower bits each, 25 bits = 4 bytes;
    # upper bits in unary: 160 / 32 + 5 + 1 = 11 bits = 2 bytes; 5 nibbles = 3 bytes; one wide.
    old = torch.zeros(160, dtype=torch.int8)
    new = old.clone()
    new[[0, 31, 32, 100, 159]] = torch.tensor([1, -7, 7, 8, -1], dtype=torch.int8)
    packed = diff(old, new).pack()
    sizes = {name: tensor.numel() for name, tensor in packed.items()}
    assert sizes == {"header": 16, "lower": 4, "upper": 2, "nibbles": 3, "wide": 1}
    assert packed["nibbles"].tolist() == [1 | 9 << 4, 7 | 8 << 4, 15]


@pytest.mark.parametrize("widest", [7, 40_000])
def test_16_bit_codes(widest):
    old, new = (t.to(torch.int16) for t in _pair(8, 500, 0.1, seed=2, widest=min(widest, 7)))
    if widest > 7:
        new[10], old[10] = -32768, 32767  # one step up, modulo 2^16
        new[11], old[11] = 30_000, -30_000
    change = unpack(diff(old, new).pack())
    assert torch.equal(change.apply(old), new)
    assert torch.equal(change.revert(new), old)
    if widest > 7:
        with pytest.raises(CorruptArtifactError, match="a patch for 500 int16 codes, not 500 of"):
            change.apply(old.to(torch.int8))


def test_an_empty_patch_is_a_few_bytes():
    codes = torch.zeros(10_000, dtype=torch.int8)
    packed = diff(codes, codes).pack()
    assert sum(tensor.numel() for tensor in packed.values()) <= 17
    assert torch.equal(unpack(packed).apply(codes), codes)


def test_a_patch_for_another_tensor_is_refused():
    codes = torch.zeros(10, dtype=torch.int8)
    with pytest.raises(CorruptArtifactError, match="a patch for 10 int8 codes, not 9"):
        diff(codes, codes).apply(codes[:9])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damage_is_noticed_or_stays_within_the_codes(data):
    old, new = _pair(4, 300, 0.1, seed=1)
    packed = diff(old, new).pack()
    name = data.draw(st.sampled_from(sorted(packed)))
    damaged = bytearray(packed[name].numpy().tobytes())
    if damaged and data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at] ^= data.draw(st.integers(1, 255))
    else:
        damaged = damaged[: data.draw(st.integers(0, max(len(damaged) - 1, 0)))]
    packed[name] = torch.tensor(list(damaged), dtype=torch.uint8)
    try:
        change = unpack(packed)
    except CorruptArtifactError:
        return
    positions = change.positions
    assert (positions >= 0).all()
    assert (positions < change.size).all()
    assert (positions.diff() > 0).all()


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("lower", None, "no list of bytes 'lower'"),
        ("upper", torch.zeros(2), "no list of bytes 'upper'"),
        ("header", torch.zeros(3, dtype=torch.uint8), "a header that is not 16 bytes"),
        ("wide", torch.ones(99, dtype=torch.uint8), "wide changes of the wrong length"),
        ("nibbles", torch.zeros(99, dtype=torch.uint8), "changes of the wrong length"),
    ],
)
def test_every_contradiction_has_its_sentence(name, tensor, message):
    packed: dict = diff(*_pair(4, 300, 0.1, seed=1)).pack()
    packed[name] = tensor
    with pytest.raises(CorruptArtifactError, match=f"{message}.* in x.qpatch"):
        unpack(packed, where="x.qpatch")


def test_an_absurd_header_allocates_nothing():
    packed = diff(*_pair(4, 300, 0.1, seed=1)).pack()
    packed["header"] = torch.tensor([2**62, 2**61]).view(torch.uint8)
    with pytest.raises(CorruptArtifactError, match="wrong length"):
        unpack(packed)


def test_a_difference_is_plain_data():
    change = SparseDiff(4, torch.tensor([1]), torch.tensor([3], dtype=torch.int8))
    assert change.apply(torch.zeros(4, dtype=torch.int8)).tolist() == [0, 3, 0, 0]
