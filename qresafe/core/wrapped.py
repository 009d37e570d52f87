"""What grids on top of another grid have in common: its shape, codes and type are theirs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qresafe.core.grids import Grid


@dataclass(frozen=True)
class WrappedGrid:
    """A grid whose codes are those of `base`, read in another way.

    Args:
        base: The grid of the codes.
    """

    base: Grid

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def code_shape(self) -> tuple[int, ...]:
        return self.base.code_shape

    @property
    def low(self) -> int:
        return self.base.low

    @property
    def high(self) -> int:
        return self.base.high

    @property
    def row_step(self) -> int:
        return self.base.row_step

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype
