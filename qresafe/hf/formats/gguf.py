"""GGUF files: Q8_0 and Q4_0 as uniform grids that can be patched; all else as decoded weights.

llama.cpp re-orders the rows of some layers (a Llama's q and k); names and order here are those of
transformers, which knows both. K-quants have scales on two levels: they are decoded only.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qresafe.core.grids import QuantizedTensor, UniformGrid
from qresafe.errors import ModelError
from qresafe.hf.gguf_folder import gguf_config, gguf_file
from qresafe.hf.tensor_files import Entry, TensorFiles

GROUP, HEAD = 32, 2  # weights per block; bytes of its float16 scale, which come first
BITS = {"Q8_0": 8, "Q4_0": 4}
TINY = torch.finfo(torch.float32).tiny  # for the scale of a block of zeros


class GgufFiles(TensorFiles):
    """A .gguf file's tensors under transformers' names.

    Layers that can be patched are their raw blocks, uint8 (out, bytes of a row), in the file's
    order of rows; everything else is decoded to float32, in transformers' order.

    Raises:
        ModelError: The architecture's tensors are not one to one those of transformers.
    """

    def __init__(self, folder: Path) -> None:
        from gguf import GGUFReader

        file = gguf_file(folder)
        if file is None:
            raise ModelError("no .gguf file", where=str(folder))
        self.folder, self.file = folder, file
        self._stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
        self._names = self._known_names()  # transformers' name -> the file's
        self.quantized = {n: kind for n in self._names if (kind := self._patchable(n))}
        self.entries = {name: self._entry(name) for name in self._names}

    def __getitem__(self, name: str) -> Tensor:
        if name in self.quantized:
            return super().__getitem__(name)
        from gguf import dequantize

        stored = self._stored[self._names[name]]
        weight = dequantize(stored.data, stored.tensor_type)
        return torch.from_numpy(np.array(self._processed(weight, stored.name), dtype=np.float32))

    def by_file(self) -> dict[str, list[str]]:
        return {"model.safetensors": list(self.entries)}  # as which decoded weights are written

    def order(self, name: str) -> Tensor:
        """Return, for each row of transformers' weight, its row in the file."""
        rows = np.arange(self._stored[self._names[name]].data.shape[0], dtype=np.float32)
        return torch.from_numpy(self._processed(rows[:, None], self._names[name])[:, 0]).long()

    @property
    def kinds(self) -> list[str]:
        """The block types in the file, sorted."""
        return sorted({stored.tensor_type.name for stored in self._stored.values()} - {"F32"})

    @cached_property
    def config(self) -> Any:
        return gguf_config(self.file)

    @cached_property
    def _model(self) -> nn.Module:
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(self.config)
        return model

    @cached_property
    def _processor(self) -> Any:
        from gguf import GGUFReader
        from transformers import modeling_gguf_pytorch_utils as converter

        field = GGUFReader(self.file).get_field("general.architecture")
        architecture = str(field.contents()) if field else ""
        kind = converter.TENSOR_PROCESSORS.get(architecture, converter.TensorProcessor)
        return kind(config=self.config.to_dict())

    def _known_names(self) -> dict[str, str]:
        from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

        found = get_gguf_hf_weights_map(self._model, self._processor)
        names = {found[name]: name for name in self._stored if name in found}
        wanted = set(self._model.state_dict())
        tied = {"lm_head.weight"} if self.config.tie_word_embeddings else set()
        if missing := sorted(wanted - tied - set(names)):
            what = f"a GGUF file of this architecture can be assessed, not patched ({missing[0]})"
            raise ModelError(what, where=str(self.file))
        return names

    def _patchable(self, name: str) -> str | None:
        """Return the block type of a linear layer that can be patched, else None."""
        stored = self._stored[self._names[name]]
        kind = stored.tensor_type.name
        layer, _, part = name.rpartition(".")
        linear = part == "weight" and isinstance(self._model.get_submodule(layer), nn.Linear)
        return kind if linear and kind in BITS else None

    def _processed(self, weight: np.ndarray, name: str) -> np.ndarray:
        done: np.ndarray = self._processor.process(weights=weight, name=name).weights
        return done

    def _entry(self, name: str) -> Entry:
        stored = self._stored[self._names[name]]
        begin, end = int(stored.data_offset), int(stored.data_offset) + int(stored.n_bytes)
        if name in self.quantized:
            return Entry(self.file.name, torch.uint8, tuple(stored.data.shape), begin, end)
        shape = tuple(int(length) for length in reversed(stored.shape))
        return Entry(self.file.name, torch.float32, shape, begin, end)


class Gguf:
    """Codec of Q8_0 and Q4_0 layers: (code - 0) * scale, one scale for 32 weights.

    Raises:
        ModelError: No layer is of these types.
    """

    name = "GGUF"

    def __init__(self, files: GgufFiles) -> None:
        self._files = files
        if not files.quantized:
            what = f"GGUF weights in {', '.join(files.kinds)} can be assessed, not patched"
            raise ModelError(what, where=str(files.file), remedy=f"use {' or '.join(BITS)}")

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(name.removesuffix(".weight") for name in self._files.quantized)

    def tensors(self, layer: str) -> tuple[str, ...]:
        return (f"{layer}.weight",)

    def read(self, layer: str) -> QuantizedTensor:
        blocks, bits = self._blocks(layer), self._bits(layer)
        scale = blocks[..., :HEAD].contiguous().view(torch.float16).squeeze(-1).float()
        scale = scale.masked_fill(scale == 0, TINY)
        body = blocks[..., HEAD:]
        codes = body.view(torch.int8) if bits == 8 else _nibbles(body)
        order = self._files.order(f"{layer}.weight")
        codes = codes.flatten(1)[order].contiguous()
        zero = torch.zeros(scale.shape, dtype=torch.int8)
        shape = (codes.shape[0], codes.shape[1])
        return QuantizedTensor(UniformGrid(scale[order], zero, bits, GROUP, shape), codes)

    def pack(self, layer: str, codes: Tensor) -> tuple[str, Tensor]:
        name, blocks = f"{layer}.weight", self._blocks(layer)
        stored = codes.to(torch.int8)[torch.argsort(self._files.order(name))]
        parts = stored.unflatten(1, (-1, GROUP))
        body = parts.view(torch.uint8) if self._bits(layer) == 8 else _bytes(parts)
        return name, torch.cat([blocks[..., :HEAD], body], dim=-1).flatten(1)

    def _blocks(self, layer: str) -> Tensor:
        raw = self._files[f"{layer}.weight"]
        return raw.unflatten(1, (-1, HEAD + GROUP * self._bits(layer) // 8))

    def _bits(self, layer: str) -> int:
        return BITS[self._files.quantized[f"{layer}.weight"]]


def codec(files: TensorFiles, config: Mapping[str, Any]) -> Gguf:
    """Return the codec of an opened .gguf file.

    Raises:
        ModelError: The folder holds something else, or no layer that can be patched.
    """
    if not isinstance(files, GgufFiles):
        raise ModelError("config.json says GGUF, but there is no .gguf", where=str(files.folder))
    return Gguf(files)


def _nibbles(body: Tensor) -> Tensor:
    """Return signed codes (.., 32): byte j holds weight j in its low half, j + 16 in its high."""
    return torch.cat([body & 15, body >> 4], dim=-1).to(torch.int8) - 8


def _bytes(codes: Tensor) -> Tensor:
    low, high = (codes + 8).to(torch.uint8).chunk(2, dim=-1)
    return high << 4 | low
