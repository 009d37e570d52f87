"""GPTQ checkpoints of AutoGPTQ and GPTQModel: 2, 3, 4 or 8 bits, any order of activations.

A layer is qweight (in * bits / 32, out), packed down the columns; scales (groups, out); qzeros
(groups, out * bits / 32), packed along the rows; and g_idx (in,), the group of each input. Format
"gptq" (v1) stores zero points less one, "gptq_v2" as they are (GPTQModel 7.7.0,
`gptqmodel/nn_modules/qlinear`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qresafe.core.grids import Grid, QuantizedTensor, UniformGrid
from qresafe.core.permuted import PermutedGrid
from qresafe.errors import ModelError
from qresafe.hf.formats.bits import WORD, pack_words, unpack_words
from qresafe.hf.tensor_files import TensorFiles

WIDTHS = (2, 3, 4, 8)
ZERO_OFFSET = {"gptq": 1, "gptq_v2": 0}  # what is added to a stored zero point
PARTS = ("qweight", "qzeros", "scales", "g_idx")


class Gptq:
    """Codec of GPTQ layers; a bias stays what it is.

    A v1 zero point that is stored as the largest code means 2^bits here, as in AutoGPTQ's and
    vLLM's kernels; v1 cannot hold a zero point of 0.

    Raises:
        ModelError: The config names another packing (marlin, ...), or an unknown width.
    """

    name = "GPTQ"

    def __init__(self, files: TensorFiles, config: Mapping[str, Any]) -> None:
        self._files, self._where = files, str(files.folder)
        packing = str(config.get("checkpoint_format") or config.get("format") or "gptq")
        packing = "marlin" if config.get("is_marlin_format") else packing
        if packing not in ZERO_OFFSET:
            remedy = f"use the checkpoint before its conversion ({', '.join(ZERO_OFFSET)})"
            what = f"GPTQ weights are packed as {packing!r}"
            raise ModelError(what, where=self._where, remedy=remedy)
        self._offset = ZERO_OFFSET[packing]
        self._bits, self._group_size = config.get("bits"), config.get("group_size", -1)
        if self._bits not in WIDTHS:
            what = f"GPTQ weights of {self._bits!r} bits"
            raise ModelError(what, where=self._where, remedy=f"use {WIDTHS}")

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(n.removesuffix(".qweight") for n in self._files if n.endswith(".qweight"))

    def tensors(self, layer: str) -> tuple[str, ...]:
        return tuple(n for part in PARTS if (n := f"{layer}.{part}") in self._files)

    def read(self, layer: str) -> QuantizedTensor:
        bits, columns = self._layout(layer)
        half = 1 << (bits - 1)
        unsigned = unpack_words(self._files[f"{layer}.qweight"], bits, columns)
        codes = (unsigned.T.to(torch.int16) - half).to(torch.int8).contiguous()
        return QuantizedTensor(self._grid(layer, bits, columns), codes)

    def pack(self, layer: str, codes: Tensor) -> tuple[str, Tensor]:
        bits, _ = self._layout(layer)
        return f"{layer}.qweight", pack_words(codes.T.to(torch.int32) + (1 << (bits - 1)), bits)

    def pack_scale(self, layer: str, scale: Tensor) -> tuple[str, Tensor]:
        return f"{layer}.scales", scale.T.contiguous()

    def _layout(self, layer: str) -> tuple[int, int]:
        """Return (bits, in): by g_idx where there is one, as bits may differ by layer."""
        words, outputs = self._files.shape(f"{layer}.qweight")
        if f"{layer}.g_idx" not in self._files:
            bits, columns = int(self._bits or 0), words * WORD // int(self._bits or 1)
        else:
            columns = self._files.shape(f"{layer}.g_idx")[0]
            tried = (int(self._bits or 0), *WIDTHS)
            bits = next((b for b in tried if -(-columns * b // WORD) == words), 0)
        groups = self._files.shape(f"{layer}.scales")[0]
        expected = (groups, outputs), (groups, -(-outputs * bits // WORD))
        found = self._files.shape(f"{layer}.scales"), self._files.shape(f"{layer}.qzeros")
        if not bits or found != expected:
            what = f"layer {layer}: qweight {(words, outputs)} does not fit scales, qzeros {found}"
            raise ModelError(what, where=self._where, remedy="copy or download the model again")
        return bits, columns

    def _grid(self, layer: str, bits: int, columns: int) -> Grid:
        scale = self._files[f"{layer}.scales"].T.contiguous()
        stored = unpack_words(self._files[f"{layer}.qzeros"].T.contiguous(), bits, len(scale))
        # int16: an 8-bit zero point of 256 is 128 when signed
        zero = stored.to(torch.int16) + self._offset - (1 << (bits - 1))
        group_of = self._group_of(layer, columns, scale.shape[1])
        width = int(torch.bincount(group_of).max())
        ordered = torch.arange(columns) // width
        if not torch.equal(group_of.sort().values, ordered):
            what = f"the groups of layer {layer} have unequal sizes"
            raise ModelError(what, where=self._where, remedy="such a g_idx is not supported")
        grid = UniformGrid(scale, zero, bits, width, (len(scale), columns))
        return grid if torch.equal(group_of, ordered) else PermutedGrid.by_group(grid, group_of)

    def _group_of(self, layer: str, columns: int, groups: int) -> Tensor:
        if f"{layer}.g_idx" in self._files:
            group_of = self._files[f"{layer}.g_idx"].long()
        else:
            width = columns if self._group_size in (-1, None) else int(self._group_size)
            group_of = torch.arange(columns) // max(width, 1)
        if int(group_of.min()) != 0 or int(group_of.max()) != groups - 1:
            what = f"layer {layer} has {groups} groups of scales, but inputs in others"
            raise ModelError(what, where=self._where, remedy="copy or download the model again")
        return group_of
