"""What a storage format must offer so that a patch can read and rewrite its codes."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from qresafe.core.grids import QuantizedTensor


class Codec(Protocol):
    """Reads and packs the codes of one checkpoint; its scales are never written."""

    name: str  # for people: "compressed-tensors pack-quantized"

    @property
    def layers(self) -> tuple[str, ...]:
        """Module names of the quantized layers, in the order of the files."""

    def tensors(self, layer: str) -> tuple[str, ...]:
        """Return the stored tensors that together make the layer's weight."""

    def read(self, layer: str) -> QuantizedTensor:
        """Return the layer's grid and codes, exactly as stored."""

    def pack(self, layer: str, codes: Tensor) -> tuple[str, Tensor]:
        """Return (name, value) of the stored tensor that holds `codes` (out, in)."""
