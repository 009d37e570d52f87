"""AWQ checkpoints of AutoAWQ, version "gemm": 4 bits, groups along the inputs.

A layer is qweight (in, out / 8), its eight codes per word interleaved (AutoAWQ 0.2.9,
`awq/modules/linear/gemm.py`); qzeros (in / group, out / 8), likewise; scales (in / group, out).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qresafe.core.grids import QuantizedTensor, UniformGrid
from qresafe.errors import ModelError
from qresafe.hf.formats.bits import WORD
from qresafe.hf.tensor_files import TensorFiles

BITS, HALF, PER_WORD = 4, 8, 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # place in the word -> place in the row
PARTS = ("qweight", "qzeros", "scales")


class Awq:
    """Codec of AutoAWQ's GEMM layers.

    Raises:
        ModelError: The config names another version (gemv, marlin, ...) or width.
    """

    name = "AWQ"

    def __init__(self, files: TensorFiles, config: Mapping[str, Any]) -> None:
        self._files, self._where = files, str(files.folder)
        version = str(config.get("version") or config.get("format") or "gemm").lower()
        bits = config.get("bits", config.get("w_bit", BITS))
        if version != "gemm" or bits != BITS:
            what = f"AWQ weights of version {version!r} and {bits} bits"
            remedy = "use AutoAWQ's version gemm, 4 bits"
            raise ModelError(what, where=self._where, remedy=remedy)

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(n.removesuffix(".qweight") for n in self._files if n.endswith(".qweight"))

    def tensors(self, layer: str) -> tuple[str, ...]:
        return tuple(n for part in PARTS if (n := f"{layer}.{part}") in self._files)

    def read(self, layer: str) -> QuantizedTensor:
        columns, outputs, groups = self._layout(layer)
        scale = self._files[f"{layer}.scales"].T.contiguous()
        zero = torch.zeros(outputs, groups, dtype=torch.int8)
        if f"{layer}.qzeros" in self._files:
            zero = _unpack(self._files[f"{layer}.qzeros"])
        grid = UniformGrid(scale, zero, BITS, columns // groups, (outputs, columns))
        return QuantizedTensor(grid, _unpack(self._files[f"{layer}.qweight"]))

    def pack(self, layer: str, codes: Tensor) -> tuple[str, Tensor]:
        parts = (codes.T.to(torch.int32) + HALF).unflatten(1, (-1, PER_WORD)).unbind(-1)
        words = torch.zeros(parts[0].shape, dtype=torch.int32)
        for place, source in enumerate(ORDER):
            words |= parts[source] << (place * BITS)
        return f"{layer}.qweight", words

    def pack_scale(self, layer: str, scale: Tensor) -> tuple[str, Tensor]:
        return f"{layer}.scales", scale.T.contiguous()

    def _layout(self, layer: str) -> tuple[int, int, int]:
        """Return (in, out, groups), having checked that the stored parts fit each other."""
        columns, words = self._files.shape(f"{layer}.qweight")
        outputs = words * WORD // BITS
        groups = self._files.shape(f"{layer}.scales")[0]
        zeros = f"{layer}.qzeros"
        fits = self._files.shape(f"{layer}.scales") == (groups, outputs) and columns % groups == 0
        if not fits or (zeros in self._files and self._files.shape(zeros) != (groups, words)):
            what = f"the qweight {(columns, words)} of {layer} does not fit its scales and zeros"
            raise ModelError(what, where=self._where, remedy="copy or download the model again")
        return columns, outputs, groups


def _unpack(words: Tensor) -> Tensor:
    """Return the signed codes (out, rows) of (rows, out / 8) words."""
    codes = torch.empty(*words.shape, PER_WORD, dtype=torch.int8)
    for place, target in enumerate(ORDER):
        codes[..., target] = (words >> (place * BITS) & 15) - HALF
    return codes.flatten(1).T.contiguous()
