"""compressed-tensors checkpoints: integers, packed (2 to 8 bits) or one per byte, and FP8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from compressed_tensors.utils.match import match_name
from torch import Tensor

from qresafe.core.fp8 import E4M3, Fp8Grid, levels
from qresafe.core.grids import Grid, QuantizedTensor, UniformGrid
from qresafe.errors import ModelError
from qresafe.hf.tensor_files import TensorFiles

STRATEGIES = ("group", "channel", "tensor")
SIDES = ("input", "output")


class CompressedTensors:
    """Codec of `pack-quantized` (any width), `int-quantized` and `float-quantized` (8 bits) layers.

    A scheme with `input_activations` rounds them when the deployed model runs, so its logits
    differ from those of the decoded weights.

    Raises:
        ModelError: The config is malformed, or uses a scheme other than integers and E4M3.
    """

    name = "compressed-tensors"

    def __init__(self, files: TensorFiles, config: Mapping[str, Any]) -> None:
        self._files = files
        parsed = _parse(config, str(files.folder))
        packed = [name.removesuffix(".weight_packed") for name in files if _is(name, "packed")]
        scaled = {name.removesuffix(".weight_scale") for name in files if _is(name, "scale")}
        plain = [layer for layer in _plain(files) if layer in scaled]
        self._args = {layer: self._scheme(parsed, layer) for layer in [*packed, *plain]}

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(self._args)

    def tensors(self, layer: str) -> tuple[str, ...]:
        parts = ("", "_packed", "_scale", "_zero_point", "_shape")
        names = [f"{layer}.weight{part}" for part in parts]
        # of the activations of this layer, and of no use without them
        names += [f"{layer}.{side}_{part}" for side in SIDES for part in ("scale", "zero_point")]
        return tuple(name for name in names if name in self._files)

    def read(self, layer: str) -> QuantizedTensor:
        return QuantizedTensor(self._grid(layer), self._codes(layer))

    def pack(self, layer: str, codes: Tensor) -> tuple[str, Tensor]:
        if self._is_packed(layer):
            packed = pack_to_int32(codes.to(torch.int8), self._args[layer].num_bits)
            return f"{layer}.weight_packed", packed.contiguous()
        if self._args[layer].type == "float":
            return f"{layer}.weight", self._floats(layer, codes)
        return f"{layer}.weight", codes.to(torch.int8)

    def pack_scale(self, layer: str, scale: Tensor) -> tuple[str, Tensor]:
        name = f"{layer}.weight_scale"
        return name, scale.reshape(self._files.shape(name)).contiguous()

    def _floats(self, layer: str, codes: Tensor) -> Tensor:
        floats = levels(codes.to(torch.int8))
        if floats.float().isnan().any():
            raise ModelError(f"a code of {layer} means NaN", where=str(self._files.folder))
        return floats

    def _grid(self, layer: str) -> Grid:
        args, shape = self._args[layer], self._shape(layer)
        scale = self._files[f"{layer}.weight_scale"].reshape(-1, self._groups(layer))
        if args.type == "float":
            return Fp8Grid(scale, _group_size(args), shape)
        return UniformGrid(scale, self._zero(layer), args.num_bits, _group_size(args), shape)

    def _codes(self, layer: str) -> Tensor:
        if not self._is_packed(layer):
            return self._files[f"{layer}.weight"].view(torch.int8)
        packed = self._files[f"{layer}.weight_packed"]
        return unpack_from_int32(packed, self._args[layer].num_bits, self._shape(layer))

    def _zero(self, layer: str) -> Tensor:
        args, groups = self._args[layer], self._groups(layer)
        if args.symmetric:
            rows = self._files.shape(f"{layer}.weight_scale")[0]
            return torch.zeros(rows, groups, dtype=torch.int8)
        zero = self._files[f"{layer}.weight_zero_point"]
        if zero.dtype == torch.int32 and self._is_packed(layer):
            shape = (self._shape(layer)[0], groups)
            return unpack_from_int32(zero, args.num_bits, shape, packed_dim=0)
        return zero.to(torch.int8).reshape(-1, groups)

    def _shape(self, layer: str) -> tuple[int, int]:
        if not self._is_packed(layer):
            rows, columns = self._files.shape(f"{layer}.weight")
            return rows, columns
        rows, columns = self._files[f"{layer}.weight_shape"].tolist()
        stored = self._files.shape(f"{layer}.weight_packed")
        if stored != (rows, -(-columns * self._args[layer].num_bits // 32)):
            what = f"{layer} is packed as {stored}, which does not fit ({rows}, {columns})"
            raise ModelError(what, where=str(self._files.folder))
        return rows, columns

    def _groups(self, layer: str) -> int:
        stored = self._files.shape(f"{layer}.weight_scale")
        return stored[1] if len(stored) == 2 else 1

    def _is_packed(self, layer: str) -> bool:
        return f"{layer}.weight_packed" in self._files

    def _scheme(self, config: QuantizationConfig, layer: str) -> QuantizationArgs:
        where = str(self._files.folder)
        args = _match(config, layer)
        if args is None:
            raise ModelError(f"no quantization scheme for layer {layer}", where=where)
        if f"{layer}.weight_g_idx" in self._files:
            # compressed-tensors 0.19 ignores g_idx without a word: the deployed weights are wrong
            what = f"layer {layer} has re-ordered groups (g_idx), which transformers cannot run"
            remedy = "quantize with activation order none or static"
            raise ModelError(what, where=where, remedy=remedy)
        if (args.type, args.num_bits) != ("float", 8) and args.type != "int":
            what = f"layer {layer} is {args.num_bits}-bit {args.type}"
            raise ModelError(what, where=where, remedy="patchable are integers and 8-bit floats")
        if args.strategy not in STRATEGIES:
            what = f"layer {layer} has scales by {args.strategy}"
            raise ModelError(what, where=where, remedy=f"use scales by {', '.join(STRATEGIES)}")
        return args


def _parse(config: Mapping[str, Any], where: str) -> QuantizationConfig:
    try:
        return QuantizationConfig.model_validate(dict(config))
    except ValueError as error:
        text = " ".join(str(error).split())[:200]
        raise ModelError(f"malformed quantization_config ({text})", where=where) from None


def _match(config: QuantizationConfig, layer: str) -> QuantizationArgs | None:
    """Return the weight scheme of `layer`; explicit names go before the class name "Linear"."""
    by_class = None
    for group in config.config_groups.values():
        if any(match_name(layer, target) for target in group.targets):
            return group.weights
        if "Linear" in group.targets:
            by_class = group.weights
    return by_class


def _group_size(args: QuantizationArgs) -> int:
    if args.strategy == "group":
        return int(args.group_size)
    return 0 if args.strategy == "tensor" else -1


def _plain(files: TensorFiles) -> list[str]:
    kinds = (torch.int8, E4M3)
    names = [name for name, entry in files.entries.items() if entry.dtype in kinds]
    return [name.removesuffix(".weight") for name in names if name.endswith(".weight")]


def _is(name: str, part: str) -> bool:
    return name.endswith(f".weight_{part}")
