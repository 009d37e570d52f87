"""Codes at their own width in memory: b bits each, unpacked block by block of rows where they act.

A width is stored as fields of 4, 2 and 1 bit, which divide a byte: 3 bits are 2 + 1. Every row
begins a byte, so that blocks of rows can be unpacked alone. Codes of 8 bits and more lie as they
are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from qresafe.core.grids import Grid

BYTE = 8


def code_bits(grid: Grid) -> int:
    """Return how many bits tell a grid's codes apart."""
    return (grid.high - grid.low).bit_length()


def pack_codes(codes: Tensor, grid: Grid) -> Tensor:
    """Return codes as uint8 (out, bytes), on their device; wide ones unchanged.

    Args:
        codes: int8 codes of `grid`, (out, ...) as its `code_shape`.
        grid: Says their range.
    """
    if not _packs(grid):
        return codes
    rest = (codes.flatten(1) - grid.low).to(torch.uint8)
    parts = []
    for field in _fields(code_bits(grid)):
        parts.append(_pack(rest & ((1 << field) - 1), field))
        rest = rest >> field
    return torch.cat(parts, dim=1)


def unpack_codes(packed: Tensor, grid: Grid) -> Tensor:
    """Return the codes (out, ...) of what `pack_codes` returned, or of a block of its rows.

    Args:
        packed: Rows of packed codes.
        grid: The grid of these rows.
    """
    if not _packs(grid):
        return packed
    count = math.prod(grid.code_shape[1:])
    codes, start, shift = torch.zeros((), dtype=torch.uint8, device=packed.device), 0, 0
    for field in _fields(code_bits(grid)):
        stop = start + math.ceil(count * field / BYTE)
        part = _unpack(packed[:, start:stop], field)[:, :count]
        codes = part.bitwise_left_shift_(shift).bitwise_or_(codes) if shift else part
        start, shift = stop, shift + field
    return codes.view(torch.int8).add_(grid.low).view(len(packed), *grid.code_shape[1:])


def _packs(grid: Grid) -> bool:
    return code_bits(grid) < BYTE


def _fields(bits: int) -> Iterator[int]:
    return (field for field in (4, 2, 1) if bits & field)


def _pack(values: Tensor, field: int) -> Tensor:
    per_byte = BYTE // field
    padded = F.pad(values, (0, -values.shape[1] % per_byte)).unflatten(1, (-1, per_byte))
    shifts = torch.arange(0, BYTE, field, dtype=torch.uint8, device=values.device)
    return (padded << shifts).sum(-1, dtype=torch.uint8)


def _unpack(packed: Tensor, field: int) -> Tensor:
    # One field of all bytes at a time: a shift that is broadcast over them takes longer.
    lowest = (1 << field) - 1
    fields = [packed >> shift & lowest for shift in range(0, BYTE, field)]
    return torch.stack(fields, dim=-1).flatten(1)
