"""A grid of 8-bit floats (E4M3): 253 distinct levels up to 448, times a scale."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qresafe.core.grids import per_group

E4M3 = torch.float8_e4m3fn  # 4 exponent bits, 3 of the mantissa; no infinity
LARGEST = 448.0  # torch makes NaN of anything that rounds to more


@dataclass(frozen=True)
class Fp8Grid:
    """Floating steps: w = float8(code) * scale (Micikevicius et al. 2022, arXiv 2209.05433).

    A code is the float's bit pattern as int8, so codes are not in the order of their values. The
    two patterns of NaN, 127 and -1, are never produced. 0 has two codes, and decodes keep its
    sign; `move` keeps a code whose weight did not change.

    Args:
        scale: Per group, (out, groups); rows may be 1 for one scale per tensor.
        group_size: Weights per scale along the row; -1 one per row, 0 one per tensor. The last
            group is shorter when `in` is not a multiple.
        shape: (out, in) of the weight.
    """

    scale: Tensor
    group_size: int
    shape: tuple[int, int]

    @property
    def code_shape(self) -> tuple[int, ...]:
        return self.shape

    @property
    def low(self) -> int:
        return -128  # the pattern of -0

    @property
    def high(self) -> int:
        return 126  # the pattern of 448

    @property
    def row_step(self) -> int:
        return 1

    @property
    def dtype(self) -> torch.dtype:
        return self.scale.dtype

    def rows(self, block: slice) -> Fp8Grid:
        """Return the grid of a block of rows."""
        height = len(range(*block.indices(self.shape[0])))
        pick = slice(None) if self.scale.shape[0] == 1 else block
        return replace(self, scale=self.scale[pick], shape=(height, self.shape[1]))

    def decode(self, codes: Tensor) -> Tensor:
        """Return the weights (out, in) that int8 `codes` stand for, in the scale's dtype."""
        return self._per_group(levels(codes).to(self.dtype), torch.Tensor.mul_)

    def encode(self, weight: Tensor) -> Tensor:
        """Return the int8 codes (out, in) of the grid points nearest to `weight`."""
        scaled = self._per_group(weight.to(torch.float32, copy=True), torch.Tensor.div_)
        return _nearest(scaled).view(torch.int8)

    def snap(self, weight: Tensor) -> Tensor:
        """Return the grid points nearest to `weight`, in its dtype."""
        return self.decode(self.encode(weight)).to(weight.dtype)

    def move(self, codes: Tensor, delta: Tensor) -> Tensor:
        """Return the codes nearest to decode(codes) + delta; exactly `codes` where delta is 0."""
        old = levels(codes).float()
        change = self._per_group(delta.to(torch.float32, copy=True), torch.Tensor.div_)
        moved = _nearest(change.add_(old))
        return torch.where(moved.float() == old, codes, moved.view(torch.int8))

    def snap_moved_(self, codes: Tensor, delta: Tensor) -> Tensor:
        """Overwrite float32 `delta` with snap(decode(codes) + delta), and return it."""
        moved = _nearest(self._per_group(delta, torch.Tensor.div_).add_(levels(codes).float()))
        return self._per_group(delta.copy_(moved), torch.Tensor.mul_)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Fp8Grid:
        """Return the grid on `device`, its scale in `dtype`."""
        return replace(self, scale=self.scale.to(device=device, dtype=dtype))

    def _per_group(self, matrix: Tensor, operation: Any) -> Tensor:
        for part, scale in per_group(matrix, self.group_size, self.scale):
            operation(part, scale)
        return matrix


def levels(codes: Tensor) -> Tensor:
    """Return int8 codes as the 8-bit floats that they are the bits of, without a copy."""
    return codes.view(E4M3)


def _nearest(scaled: Tensor) -> Tensor:
    """Return the nearest 8-bit floats, ties to even; `scaled` is clamped in place."""
    # A dead group may have scale 0: any level is right there, but NaN has no code.
    return scaled.nan_to_num_(0.0).clamp_(-LARGEST, LARGEST).to(E4M3)
