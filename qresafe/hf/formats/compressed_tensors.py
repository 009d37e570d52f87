"""compressed-tensors checkpoints: integer weights, packed (2 to 8 bits) or one per byte."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from compressed_tensors.utils.match import match_name
from torch import Tensor

from qresafe.core.grids import QuantizedTensor, UniformGrid
from qresafe.errors import ModelError
from qresafe.hf.tensor_files import TensorFiles

STRATEGIES = ("group", "channel", "tensor")


class CompressedTensors:
    """Codec of `pack-quantized` (any width) and `int-quantized` (8 bits) layers.

    Raises:
        ModelError: The config is malformed, or uses a scheme other than plain integer weights.
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
        parts = ("", "_packed", "_scale", "_zero_point", "_shape", "_g_idx")
        names = [f"{layer}.weight{part}" for part in parts]
        return tuple(name for name in names if name in self._files)

    def read(self, layer: str) -> QuantizedTensor:
        args = self._args[layer]
        grid = UniformGrid(
            scale=self._files[f"{layer}.weight_scale"].reshape(-1, self._groups(layer)),
            zero=self._zero(layer),
            bits=args.num_bits,
            group_size=_group_size(args),
            shape=self._shape(layer),
        )
        return QuantizedTensor(grid, self._codes(layer))

    def pack(self, layer: str, codes: Tensor) -> tuple[str, Tensor]:
        if self._is_packed(layer):
            packed = pack_to_int32(codes.to(torch.int8), self._args[layer].num_bits)
            return f"{layer}.weight_packed", packed.contiguous()
        return f"{layer}.weight", codes.to(torch.int8)

    def _codes(self, layer: str) -> Tensor:
        if not self._is_packed(layer):
            return self._files[f"{layer}.weight"]
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
            remedy = "quantize without activation ordering (actorder: null or static)"
            raise ModelError(f"layer {layer} has re-ordered groups", where=where, remedy=remedy)
        if args.type != "int" or args.strategy not in STRATEGIES:
            what = f"layer {layer} is {args.type} by {args.strategy}; patchable are integers"
            remedy = f"use integer weights by {', '.join(STRATEGIES)}"
            raise ModelError(what, where=where, remedy=remedy)
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
    names = [name for name, entry in files.entries.items() if entry.dtype == torch.int8]
    return [name.removesuffix(".weight") for name in names if name.endswith(".weight")]


def _is(name: str, part: str) -> bool:
    return name.endswith(f".weight_{part}")
