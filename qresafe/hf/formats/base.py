"""What a storage format must offer so that a patch can read and rewrite its codes, or scales."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from qresafe.core.grids import QuantizedTensor


class Codec(Protocol):
    """Reads and packs the codes of one checkpoint."""

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


@runtime_checkable
class ScaleCodec(Protocol):
    """A codec of a format that stores each scale of its grids as it is, a float of some width."""

    def pack_scale(self, layer: str, scale: Tensor) -> tuple[str, Tensor]:
        """Return (name, value) of the stored tensor that holds the scales of the layer's grid."""
