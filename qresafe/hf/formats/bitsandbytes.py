"""bitsandbytes checkpoints: NF4 and FP4 (plain or double-quantized scales), and LLM.int8().

Only files are read: on CPUs with AVX512-BF16 a module that has run a forward pass no longer holds
the codes that its checkpoint does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qresafe.core.grids import CodebookGrid, QuantizedTensor, UniformGrid
from qresafe.errors import ModelError
from qresafe.hf.tensor_files import TensorFiles

INT8_UNIT = 7.874015718698502e-3  # 1/127 as bitsandbytes' kernels spell it
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STATE = ".weight.quant_state.bitsandbytes__"
FOUR_BIT_PARTS = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


def codec(files: TensorFiles, config: Mapping[str, Any]) -> FourBit | Int8:
    """Return the codec of a checkpoint's 4-bit or 8-bit layers."""
    if config.get("load_in_8bit"):
        return Int8(files, config)
    absmax = [entry.dtype for name, entry in files.entries.items() if name.endswith(".absmax")]
    plain = all(dtype == torch.float32 for dtype in absmax)
    return (PlainFourBit if plain else FourBit)(files, config)


class FourBit:
    """Codec of NF4 and FP4: two codes per byte, the first in the high half."""

    name = "bitsandbytes 4-bit"

    def __init__(self, files: TensorFiles, config: Mapping[str, Any]) -> None:
        self._files = files
        if config.get("bnb_4bit_quant_storage", "uint8") != "uint8":
            remedy = "save it with bnb_4bit_quant_storage=torch.uint8"
            what = "4-bit codes are not stored as uint8"
            raise ModelError(what, where=str(files.folder), remedy=remedy)
        self._state_name = {name.split(STATE)[0]: name for name in files if STATE in name}

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(self._state_name)

    def tensors(self, layer: str) -> tuple[str, ...]:
        names = [f"{layer}.weight{part}" for part in FOUR_BIT_PARTS]
        stored = [name for name in names if name in self._files]
        return (*stored, self._state_name[layer])

    def read(self, layer: str) -> QuantizedTensor:
        state = self._state(layer)
        shape = (int(state["shape"][0]), int(state["shape"][1]))
        packed = self._files[f"{layer}.weight"].reshape(-1)
        if packed.numel() * 2 != shape[0] * shape[1]:
            what = f"{layer} holds {packed.numel()} bytes, which does not fit {shape}"
            raise ModelError(what, where=str(self._files.folder))
        codes = torch.stack([packed >> 4, packed & 15], dim=1).reshape(shape).to(torch.int8)
        grid = CodebookGrid(
            codebook=self._files[f"{layer}.weight.quant_map"].float(),
            absmax=self._absmax(layer, state),
            block_size=int(state["blocksize"]),
            shape=shape,
            dtype=FLOATS[state["dtype"]],
        )
        return QuantizedTensor(grid, codes)

    def pack(self, layer: str, codes: Tensor) -> tuple[str, Tensor]:
        high, low = codes.to(torch.uint8).reshape(-1, 2).unbind(dim=1)
        stored = self._files.shape(f"{layer}.weight")
        return f"{layer}.weight", (high << 4 | low).reshape(stored)

    def _state(self, layer: str) -> dict[str, Any]:
        text = self._files[self._state_name[layer]].numpy().tobytes()
        try:
            state = json.loads(text)
            complete = len(state["shape"]) == 2 and state["dtype"] in FLOATS and state["blocksize"]
        except (ValueError, TypeError, KeyError):
            complete = False
        if not complete:
            raise ModelError(f"malformed quant_state of {layer}", where=str(self._files.folder))
        return dict(state)

    def _absmax(self, layer: str, state: Mapping[str, Any]) -> Tensor:
        absmax = self._files[f"{layer}.weight.absmax"]
        if absmax.dtype != torch.uint8:
            return absmax.float()
        codebook = self._files[f"{layer}.weight.nested_quant_map"].float()
        outer = self._files[f"{layer}.weight.nested_absmax"].float()
        block = outer.repeat_interleave(int(state["nested_blocksize"]))[: absmax.numel()]
        return codebook[absmax.long()] * block + float(state["nested_offset"])


class PlainFourBit(FourBit):
    """Codec of NF4 and FP4 without double quantization: scales are stored as they are."""

    def pack_scale(self, layer: str, scale: Tensor) -> tuple[str, Tensor]:
        return f"{layer}.weight.absmax", scale


class Int8:
    """Codec of LLM.int8(): one row-wise scaled byte per weight.

    A deployed LLM.int8() model also rounds its activations (but outlier columns) at run time, so
    its logits differ slightly from those of the decoded weights.
    """

    name = "bitsandbytes LLM.int8()"

    def __init__(self, files: TensorFiles, config: Mapping[str, Any]) -> None:
        self._files = files
        self._layers = tuple(n.removesuffix(".SCB") for n in files if n.endswith(".SCB"))

    @property
    def layers(self) -> tuple[str, ...]:
        return self._layers

    def tensors(self, layer: str) -> tuple[str, ...]:
        names = (f"{layer}.weight", f"{layer}.SCB", f"{layer}.weight_format")
        return tuple(name for name in names if name in self._files)

    def read(self, layer: str) -> QuantizedTensor:
        codes = self._files[f"{layer}.weight"]
        scale = self._files[f"{layer}.SCB"].float().reshape(-1, 1) * INT8_UNIT
        zero = torch.zeros(scale.shape, dtype=torch.int8)
        shape = (codes.shape[0], codes.shape[1])
        return QuantizedTensor(UniformGrid(scale, zero, 8, -1, shape), codes)

    def pack(self, layer: str, codes: Tensor) -> tuple[str, Tensor]:
        return f"{layer}.weight", codes.to(torch.int8)
