"""AQLM checkpoints: additive codebooks as the `aqlm` package and transformers store them.

Of a layer there are codes (out, in / group, M), codebooks (M, 2^bits, 1, group) and scales
(out, 1, 1, 1). A patch rewrites the codes alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qresafe.core.additive import AdditiveGrid
from qresafe.core.grids import QuantizedTensor
from qresafe.errors import ModelError
from qresafe.hf.models import read_config
from qresafe.hf.tensor_files import TensorFiles

PARTS = ("codes", "codebooks", "scales")


class Aqlm:
    """Codec of AQLM layers with groups along the inputs only (out_group_size 1).

    Weights decode in the type that config.json names, to which transformers converts codebooks
    and scales when it loads them.

    Raises:
        ModelError: The config is malformed, or groups span several outputs.
    """

    name = "AQLM"

    def __init__(self, files: TensorFiles, config: Mapping[str, Any]) -> None:
        self._files = files
        self._bits = config.get("nbits_per_codebook", 16)
        where = str(files.folder)
        if not isinstance(self._bits, int) or not 1 <= self._bits <= 16:
            what = f"nbits_per_codebook is {self._bits!r}, not an integer from 1 to 16"
            raise ModelError(what, where=where)
        if config.get("out_group_size", 1) != 1:
            remedy = "use a checkpoint with out_group_size 1"
            raise ModelError("a code spans several outputs", where=where, remedy=remedy)
        stored = read_config(files.folder)
        named = getattr(torch, str(stored.get("dtype") or stored.get("torch_dtype")), None)
        self._dtype = named if isinstance(named, torch.dtype) else None

    @property
    def layers(self) -> tuple[str, ...]:
        codes = (name for name in self._files if name.endswith(".codes"))
        return tuple(name.removesuffix(".codes") for name in codes)

    def tensors(self, layer: str) -> tuple[str, ...]:
        return tuple(f"{layer}.{part}" for part in PARTS)

    def read(self, layer: str) -> QuantizedTensor:
        codes, codebooks, scales = (self._files[name] for name in self.tensors(layer))
        books, size, _, group = codebooks.shape
        rows, groups, wanted = codes.shape
        if (wanted, size, len(scales)) != (books, 1 << self._bits, rows):
            shapes = f"codes {tuple(codes.shape)}, codebooks {tuple(codebooks.shape)}"
            raise ModelError(f"{layer}: {shapes} do not fit", where=str(self._files.folder))
        grid = AdditiveGrid(
            codebooks[:, :, 0], scales.view(rows, 1), self._bits, (rows, groups * group)
        )
        return QuantizedTensor(grid.to(dtype=self._dtype), codes)

    def pack(self, layer: str, codes: Tensor) -> tuple[str, Tensor]:
        name = f"{layer}.codes"
        return name, codes.to(self._files.entries[name].dtype)
