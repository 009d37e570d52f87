"""A grid whose groups are runs of re-ordered columns (GPTQ's activation order, `g_idx`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qresafe.core.grids import Grid
from qresafe.core.wrapped import WrappedGrid


@dataclass(frozen=True)
class PermutedGrid(WrappedGrid):
    """`base` on the weight's columns in the order `order`; codes stay in the stored order.

    Args:
        base: Grid of `weight[:, order]`.
        order: int64 permutation of the `in` columns that brings each group together.
    """

    order: Tensor

    @classmethod
    def by_group(cls, base: Grid, group_of: Tensor) -> PermutedGrid:
        """Return the grid for columns that belong to group `group_of[column]` of `base`."""
        return cls(base, torch.argsort(group_of.long(), stable=True))

    def rows(self, block: slice) -> PermutedGrid:
        return replace(self, base=self.base.rows(block))

    def decode(self, codes: Tensor) -> Tensor:
        return self.base.decode(codes[:, self.order])[:, self._back]

    def encode(self, weight: Tensor) -> Tensor:
        return self.base.encode(weight[:, self.order])[:, self._back]

    def snap(self, weight: Tensor) -> Tensor:
        return self.base.snap(weight[:, self.order])[:, self._back]

    def move(self, codes: Tensor, delta: Tensor) -> Tensor:
        return self.base.move(codes[:, self.order], delta[:, self.order])[:, self._back]

    def snap_moved_(self, codes: Tensor, delta: Tensor) -> Tensor:
        moved = self.base.snap_moved_(codes[:, self.order], delta[:, self.order])
        return delta.copy_(moved[:, self._back])

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> PermutedGrid:
        return PermutedGrid(self.base.to(device, dtype), self.order.to(device))

    @cached_property
    def _back(self) -> Tensor:
        return torch.argsort(self.order)
