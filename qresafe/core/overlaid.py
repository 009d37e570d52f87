"""Grids with something fixed on top of them: a low-rank adapter, or weights kept in 16 bits.

What is on top belongs to the model, not to its codes: `decode` shows it, and no code moves for it.
So a patch of such a model trains on what is deployed and still changes nothing but codes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qresafe.core.wrapped import WrappedGrid


@dataclass(frozen=True)
class OverlaidGrid(WrappedGrid, ABC):
    """A grid that decodes to `base`'s weights with something done to them."""

    @abstractmethod
    def rows(self, block: slice) -> OverlaidGrid:
        """Return the grid of a block of rows."""

    @abstractmethod
    def cover_(self, weight: Tensor) -> Tensor:
        """Overwrite decoded weights of the base with the deployed ones, and return them."""

    @abstractmethod
    def encode(self, weight: Tensor) -> Tensor:
        """Return the codes whose deployed weights are nearest to `weight`."""

    @abstractmethod
    def move(self, codes: Tensor, delta: Tensor) -> Tensor:
        """Return the codes nearest to decode(codes) + delta; exactly `codes` where delta is 0."""

    def decode(self, codes: Tensor) -> Tensor:
        """Return the deployed weights (out, in) above `codes`."""
        return self.cover_(self.base.decode(codes))

    def snap(self, weight: Tensor) -> Tensor:
        """Return the deployable weights nearest to `weight`, in its dtype."""
        return self.decode(self.encode(weight)).to(weight.dtype)

    def snap_moved_(self, codes: Tensor, delta: Tensor) -> Tensor:
        """Overwrite float32 `delta` with snap(decode(codes) + delta), and return it."""
        return self.cover_(self.base.snap_moved_(codes, delta))

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> OverlaidGrid:
        """Return the grid on `device`, decoding to `dtype`."""
        moved = {
            name: value.to(device=device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, base=self.base.to(device=device, dtype=dtype), **moved)


@dataclass(frozen=True)
class AdaptedGrid(OverlaidGrid):
    """Deployed is decode(codes) + B A scaling: a LoRA adapter beside a quantized layer.

    Args:
        base: The grid of the codes.
        A: (rank, in).
        B: (out, rank).
        scaling: alpha / rank.
    """

    A: Tensor
    B: Tensor
    scaling: float

    def rows(self, block: slice) -> AdaptedGrid:
        """Return the grid of a block of rows."""
        return replace(self, base=self.base.rows(block), B=self.B[block])

    def cover_(self, weight: Tensor) -> Tensor:
        """Add the adapter to decoded weights of the base, in place."""
        return weight.add_(self._product(weight.dtype))

    def encode(self, weight: Tensor) -> Tensor:
        """Return the codes nearest to what `weight` is without the adapter."""
        return self.base.encode(weight.float() - self._product(torch.float32))

    def move(self, codes: Tensor, delta: Tensor) -> Tensor:
        """Return the base's codes nearest to decode(codes) + delta: the adapter stays."""
        return self.base.move(codes, delta)

    def _product(self, dtype: torch.dtype) -> Tensor:
        return ((self.B.float() @ self.A.float()) * self.scaling).to(dtype)


@dataclass(frozen=True)
class KeptGrid(OverlaidGrid):
    """Deployed is decode(codes), but for single weights that were kept in 16 bits.

    The codes beneath kept weights act on nothing; `move` leaves them alone. `encode` knows them
    only as the base's codes of the kept values, so that is what a checkpoint stores there.

    Args:
        base: The grid of the codes.
        positions: int64, sorted, into the flattened weight.
        values: The kept weights, same length.
    """

    positions: Tensor
    values: Tensor

    def rows(self, block: slice) -> KeptGrid:
        """Return the grid of a block of rows."""
        start, stop, _ = block.indices(self.shape[0])
        ends = torch.tensor([start, max(start, stop)], device=self.positions.device)
        first, last = torch.searchsorted(self.positions, ends * self.shape[1]).tolist()
        inside = slice(first, last)
        positions = self.positions[inside] - start * self.shape[1]
        base = self.base.rows(block)
        return replace(self, base=base, positions=positions, values=self.values[inside])

    def cover_(self, weight: Tensor) -> Tensor:
        """Put the kept weights in the place of decoded ones."""
        weight.view(-1)[self.positions] = self.values.to(weight.dtype)
        return weight

    def encode(self, weight: Tensor) -> Tensor:
        """Return the base's codes of `weight`."""
        return self.base.encode(weight)

    def move(self, codes: Tensor, delta: Tensor) -> Tensor:
        """Return the moved codes; those beneath kept weights stay as they are."""
        moved = self.base.move(codes, delta)
        if self.code_shape == self.shape:  # else a code stands for others, which may move
            moved.view(-1)[self.positions] = codes.reshape(-1)[self.positions].to(moved.dtype)
        return moved
