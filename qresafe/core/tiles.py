"""Tiles of a weight that are kept in 16 bits: single weights, whole rows, or blocks between.

A tile is named by one number, whatever it holds, and its weights lie together: so a row of many
weights costs one position, and is one dense product for a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SINGLE = (1, 1)


@dataclass(frozen=True)
class Tiles:
    """Kept tiles of one weight.

    Args:
        shape: (out, in) of the weight.
        ids: int64, sorted, distinct: tiles are counted along the rows of tiles.
        values: (tiles, rows, columns), 16-bit; rows divide `out`, columns divide `in`.
    """

    shape: tuple[int, int]
    ids: Tensor
    values: Tensor

    @property
    def tile(self) -> tuple[int, int]:
        """(rows, columns) of a tile."""
        return self.values.shape[1], self.values.shape[2]

    @property
    def are_rows(self) -> bool:
        """Whether each tile is a whole row."""
        return self.tile == (1, self.shape[1])

    def corners(self) -> tuple[Tensor, Tensor]:
        """Return row and column of each tile's first weight."""
        rows, columns = self.tile
        across = self.shape[1] // columns
        return self.ids // across * rows, self.ids % across * columns

    def weights(self) -> tuple[Tensor, Tensor]:
        """Return positions in the flattened weight, sorted, and the values there."""
        top, left = self.corners()
        down, along = (torch.arange(n, device=self.ids.device) for n in self.tile)
        rows = (top[:, None] + down)[:, :, None] * self.shape[1]
        positions, order = (rows + (left[:, None] + along)[:, None]).flatten().sort()
        return positions, self.values.flatten()[order]


def fits(shape: tuple[int, ...], tile: tuple[int, int]) -> bool:
    """Return whether tiles fill a weight of `shape` exactly."""
    return not any(length % part for length, part in zip(shape, tile, strict=True))


def count_tiles(shape: tuple[int, int], tile: tuple[int, int]) -> int:
    """Return how many tiles a weight of `shape` has."""
    return shape[0] // tile[0] * (shape[1] // tile[1])


def cut(weight: Tensor, tile: tuple[int, int]) -> Tensor:
    """Return the tiles (tiles, rows, columns) of a weight (out, in)."""
    rows, columns = tile
    grid = weight.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    return grid.transpose(1, 2).flatten(0, 1)
