"""The values that a low-bit weight can take: Quant of paper Eq. 2, on Q0's own grid.

A grid turns codes into weights (`decode`), weights into the nearest codes (`encode`), and codes
plus a change of the weights into new codes (`move`). Its scales never change: that is what makes
the patched model a checkpoint of the same format and size (DESIGN section 4, point 3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

# bitsandbytes' tables in its own index order (NF4: Dettmers et al. 2023, arXiv 2305.14314).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = (
    0.0, 0.005208333333333333, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25,
    0.0, -0.005208333333333333, -2 / 3, -1.0, -1 / 3, -0.5, -1 / 6, -0.25,
)  # fmt: skip


class Grid(Protocol):
    """What the patch asks of a grid.

    Codes are integers; they have the weight's shape (out, in) or, where one code stands for
    several weights, (out, ...) with `code_shape` in full. Their first dimension is always `out`.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of the codes."""

    @property
    def low(self) -> int:
        """The smallest code."""

    @property
    def high(self) -> int:
        """The largest code."""

    @property
    def row_step(self) -> int:
        """Blocks of rows must start at a multiple of this."""

    @property
    def dtype(self) -> torch.dtype:
        """Of decoded weights."""

    def rows(self, block: slice) -> Grid:
        """Return the grid of a block of rows."""

    def decode(self, codes: Tensor) -> Tensor:
        """Return the weights (out, in) that codes stand for."""

    def encode(self, weight: Tensor) -> Tensor:
        """Return the codes of the grid points nearest to `weight`."""

    def snap(self, weight: Tensor) -> Tensor:
        """Return the grid points nearest to `weight`, in its dtype."""

    def move(self, codes: Tensor, delta: Tensor) -> Tensor:
        """Return the codes nearest to decode(codes) + delta; exactly `codes` where delta is 0."""

    def snap_moved_(self, codes: Tensor, delta: Tensor) -> Tensor:
        """Overwrite float32 `delta` with snap(decode(codes) + delta), and return it."""

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Grid:
        """Return the grid on `device`, decoding to `dtype`."""


@dataclass(frozen=True)
class UniformGrid:
    """Equal steps: w = (code - zero) * scale, code in [-2^(bits-1), 2^(bits-1) - 1].

    This is compressed-tensors' convention (signed codes and zero points, also when asymmetric).
    In bfloat16, asymmetric 8-bit codes farther than 128 from the zero point share values; there
    `encode` returns one of them, while `move` always keeps a code whose weight did not change.

    Args:
        scale: Step per group, (out, groups); rows may be 1 for one scale per tensor.
        zero: int8 code that stands for 0, same shape; all 0 for a symmetric grid.
        bits: Code width, 2 to 8.
        group_size: Weights per scale along the row; -1 one per row, 0 one per tensor. The last
            group is shorter when `in` is not a multiple.
        shape: (out, in) of the weight.
    """

    scale: Tensor
    zero: Tensor
    bits: int
    group_size: int
    shape: tuple[int, int]

    @property
    def code_shape(self) -> tuple[int, ...]:
        return self.shape

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @property
    def row_step(self) -> int:
        return 1

    @property
    def dtype(self) -> torch.dtype:
        return self.scale.dtype

    def rows(self, block: slice) -> UniformGrid:
        """Return the grid of a block of rows."""
        height = len(range(*block.indices(self.shape[0])))
        pick = slice(None) if self.scale.shape[0] == 1 else block
        shape = (height, self.shape[1])
        return replace(self, scale=self.scale[pick], zero=self.zero[pick], shape=shape)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the weights (out, in) that int8 `codes` stand for, in the scale's dtype."""
        weight = codes.to(self.dtype)
        for part, scale, zero in self._parts(weight):
            part.sub_(zero.to(self.dtype)).mul_(scale)
        return weight

    def encode(self, weight: Tensor) -> Tensor:
        """Return the int8 codes (out, in) of the grid points nearest to `weight`."""
        codes = weight.to(_working(weight.dtype), copy=True)
        for part, scale, zero in self._parts(codes):
            part.div_(scale).add_(zero)
        return codes.clamp_(self.low, self.high).round_().to(torch.int8)

    def snap(self, weight: Tensor) -> Tensor:
        """Return the grid points nearest to `weight`, in its dtype."""
        return self.decode(self.encode(weight)).to(weight.dtype)

    def move(self, codes: Tensor, delta: Tensor) -> Tensor:
        """Return the codes nearest to decode(codes) + delta; exactly `codes` where delta is 0."""
        moved = delta.to(_working(delta.dtype), copy=True)
        return self._move(codes, moved).to(torch.int8)

    def snap_moved_(self, codes: Tensor, delta: Tensor) -> Tensor:
        """Overwrite float32 `delta` with snap(decode(codes) + delta), and return it."""
        self._move(codes, delta)
        for part, scale, zero in self._parts(delta):
            part.sub_(zero).mul_(scale)
        return delta

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> UniformGrid:
        """Return the grid on `device`, its scale in `dtype`."""
        scale = self.scale.to(device=device, dtype=dtype)
        return replace(self, scale=scale, zero=self.zero.to(device=device))

    def _move(self, codes: Tensor, delta: Tensor) -> Tensor:
        # round(code + delta/scale) needs no decoded weight, so delta = 0 gives back the code
        # itself whatever the scale's precision.
        for part, scale, _ in self._parts(delta):
            part.div_(scale)
        return delta.add_(codes).clamp_(self.low, self.high).round_()

    def _parts(self, matrix: Tensor) -> Iterator[tuple[Tensor, ...]]:
        return per_group(matrix, self.group_size, self.scale, self.zero)


@dataclass(frozen=True)
class CodebookGrid:
    """A table of levels: w = codebook[code] * absmax of its block (NF4, FP4).

    FP4 has two codes for 0; `encode` returns the first, `move` keeps a code whose weight did not
    change.

    Args:
        codebook: The levels in index order, (levels,), at most 128 of them.
        absmax: float32, one per block of the flattened (out * in) weight; the last may be short.
        block_size: Weights per block.
        shape: (out, in) of the weight.
        dtype: Of decoded weights.
    """

    codebook: Tensor
    absmax: Tensor
    block_size: int
    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32

    @property
    def code_shape(self) -> tuple[int, ...]:
        return self.shape

    @property
    def low(self) -> int:
        return 0

    @property
    def high(self) -> int:
        return len(self.codebook) - 1

    @property
    def row_step(self) -> int:
        return self.block_size // math.gcd(self.block_size, self.shape[1])

    def rows(self, block: slice) -> CodebookGrid:
        """Return the grid of a block of rows that starts at a multiple of `row_step`."""
        start, stop, _ = block.indices(self.shape[0])
        first = start * self.shape[1] // self.block_size
        last = -(-stop * self.shape[1] // self.block_size)
        return replace(self, absmax=self.absmax[first:last], shape=(stop - start, self.shape[1]))

    def decode(self, codes: Tensor) -> Tensor:
        """Return the weights (out, in) that int8 `codes` stand for, in `dtype`."""
        levels = self.codebook[codes.to(torch.int32)].float()
        return self._per_block(levels, torch.Tensor.mul_).to(self.dtype)

    def encode(self, weight: Tensor) -> Tensor:
        """Return the int8 codes (out, in) of the levels nearest to `weight`."""
        levels = weight.to(torch.float32, copy=True)
        return self._nearest(self._per_block(levels, torch.Tensor.div_))

    def snap(self, weight: Tensor) -> Tensor:
        """Return the grid points nearest to `weight`, in its dtype."""
        return self.decode(self.encode(weight)).to(weight.dtype)

    def move(self, codes: Tensor, delta: Tensor) -> Tensor:
        """Return the codes nearest to decode(codes) + delta; exactly `codes` where delta is 0."""
        old = self.codebook[codes.to(torch.int32)].float()
        levels = self._per_block(delta.to(torch.float32, copy=True), torch.Tensor.div_)
        moved = self._nearest(levels.add_(old))
        same = self.codebook[moved.to(torch.int32)] == old
        return torch.where(same, codes, moved)

    def snap_moved_(self, codes: Tensor, delta: Tensor) -> Tensor:
        """Overwrite float32 `delta` with snap(decode(codes) + delta), and return it."""
        return delta.copy_(self.decode(self.move(codes, delta)))

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> CodebookGrid:
        """Return the grid on `device`, decoding to `dtype`."""
        return replace(
            self,
            codebook=self.codebook.to(device=device),
            absmax=self.absmax.to(device=device),
            dtype=dtype or self.dtype,
        )

    def _nearest(self, levels: Tensor) -> Tensor:
        ordered, order = torch.sort(self.codebook, stable=True)
        # A block of zeros divides 0 by 0; any code is right there, 0 / NaN must stay in range.
        index = torch.bucketize(levels.nan_to_num_(0.0), (ordered[1:] + ordered[:-1]) / 2)
        return order.to(torch.int8)[index]

    def _per_block(self, matrix: Tensor, operation: Any) -> Tensor:
        flat = matrix.view(-1)
        full = flat.numel() // self.block_size
        inside = full * self.block_size
        operation(flat[:inside].view(full, self.block_size), self.absmax[:full, None])
        if inside < flat.numel():
            operation(flat[inside:], self.absmax[full])
        return matrix


@dataclass(frozen=True)
class QuantizedTensor:
    """One layer of Q0: a grid and integer codes on it, (out, in) unless it says otherwise."""

    grid: Grid
    codes: Tensor

    def dense(self) -> Tensor:
        """Return the de-quantized weight (out, in)."""
        return self.grid.decode(self.codes)


def fit_uniform(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> UniformGrid:
    """Return the min-max grid of `weight`: round to nearest, as compressed-tensors fits it.

    Args:
        weight: (out, in), any float dtype; scales get the same dtype.
        bits: 2 to 8.
        group_size: Weights per scale along the row; -1 one per row, 0 one per tensor.
        symmetric: Zero point 0, and the range centred on it.
    """
    low, high = _ranges(weight, group_size)
    # 0 must be representable, or padding and dead weights would move.
    low, high = low.clamp(max=0), high.clamp(min=0)
    steps = (1 << bits) - 1
    if symmetric:
        scale = torch.maximum(-low, high) / (steps / 2)
        zero = torch.zeros_like(scale)
    else:
        scale = (high - low) / steps
        bottom = -(1 << (bits - 1))
        zero = (bottom - low / scale).clamp(bottom, bottom + steps).nan_to_num(0.0).round()
    scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
    shape = (weight.shape[0], weight.shape[1])
    return UniformGrid(scale, zero.to(torch.int8), bits, group_size, shape)


def fit_codebook(weight: Tensor, codebook: tuple[float, ...], block_size: int) -> CodebookGrid:
    """Return the absmax grid of `weight` over blocks of the flattened tensor (bitsandbytes).

    Args:
        weight: (out, in).
        codebook: `NF4` or `FP4`, or any levels within [-1, 1].
        block_size: Weights per block, e.g. 64.
    """
    flat = weight.detach().float().abs().flatten()
    pad = -flat.numel() % block_size
    absmax = torch.nn.functional.pad(flat, (0, pad)).view(-1, block_size).amax(1)
    levels = torch.tensor(codebook, dtype=torch.float32, device=weight.device)
    shape = (weight.shape[0], weight.shape[1])
    return CodebookGrid(levels, absmax, block_size, shape, weight.dtype)


def per_group(matrix: Tensor, group_size: int, *parameters: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield views (rows, groups, width) of `matrix`, each with broadcastable parameters.

    Args:
        matrix: (out, in).
        group_size: Weights per group along the row; the last one is shorter when `in` is not a
            multiple. 0 and -1 make one group of the row.
        parameters: One value per group, (out or 1, groups).
    """
    columns = matrix.shape[1]
    width = group_size if 0 < group_size < columns else columns
    full = columns // width
    inner = matrix[:, : full * width].unflatten(1, (full, width))
    yield inner, *(values[:, :full, None] for values in parameters)
    if rest := columns - full * width:
        tail = matrix[:, full * width :].unflatten(1, (1, rest))
        yield tail, *(values[:, full:, None] for values in parameters)


def straight_through(weight: Tensor, grid: Grid) -> Tensor:
    """Return snap(weight) in the forward pass, with the identity as its gradient.

    The straight-through estimator (Bengio et al. 2013) lets training see the rounding that the
    exported checkpoint will have; weights beyond the grid's ends keep their gradient too.
    """
    snapped: Tensor = _StraightThrough.apply(weight, grid)
    return snapped


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, grid: Grid) -> Tensor:
        return grid.snap(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _ranges(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Return minimum and maximum (out or 1, groups) of every group."""
    if group_size == 0:
        return weight.amin().view(1, 1), weight.amax().view(1, 1)
    width = weight.shape[1] if group_size == -1 else group_size
    groups = weight.split(width, dim=1)
    low = torch.stack([g.amin(1) for g in groups], dim=1)
    return low, torch.stack([g.amax(1) for g in groups], dim=1)
