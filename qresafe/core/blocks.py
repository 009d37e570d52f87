"""Small shared tools: cache-sized row blocks, and random numbers that depend on names only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch

# A block of float32 that stays in a core's second-level cache, so that a chain of element-wise
# operations reads memory once; an accelerator wants few, large kernels instead.
CPU_BLOCK = 1 << 18
DEVICE_BLOCK = 1 << 26


def row_blocks(rows: int, columns: int, device: torch.device, step: int = 1) -> Iterator[slice]:
    """Yield slices that cover `rows` rows in blocks of a size that suits the device.

    Args:
        rows: Number of rows of the matrix.
        columns: Number of elements in a row.
        device: Where the matrix lives.
        step: Every block but the last has a multiple of this many rows.
    """
    budget = CPU_BLOCK if device.type == "cpu" else DEVICE_BLOCK
    height = max(budget // max(columns, 1) // step, 1) * step
    for start in range(0, rows, height):
        yield slice(start, min(start + height, rows))


def keyed_generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator that depends on `seed` and `name` alone, not on any order of use."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
