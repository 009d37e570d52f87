"""What may lie beside the codes of a quantized checkpoint: a LoRA adapter, or 16-bit weights.

adapter_config.json, adapter_model.safetensors   PEFT's files; plain transformers loads them too
critical16.safetensors                           tiles in 16 bits; qresafe alone loads them

Of each layer the latter holds `header`, `lower` and `upper`, which are the numbers of its kept
tiles, and `values`: (tiles,) for single weights, else (tiles, rows, columns).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qresafe.core.grids import QuantizedTensor
from qresafe.core.overlaid import AdaptedGrid, KeptGrid
from qresafe.core.sparse_patch import pack_positions, unpack_positions
from qresafe.core.tiles import SINGLE, Tiles, count_tiles, cut, fits
from qresafe.errors import CorruptArtifactError, ModelError
from qresafe.hf.models import ADAPTER_CONFIG, KEPT, read_config
from qresafe.hf.tensor_files import TensorFiles

ADAPTER = "adapter_model.safetensors"
PREFIX = "base_model.model."
# What an adapter may say and still be W + B A alpha / rank; anything else is refused.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    **dict.fromkeys(("use_dora", "use_rslora", "fan_in_fan_out", "lora_bias"), (False, None)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "modules_to_save"), ({}, None)),
}


class Overlays:
    """Adds to a layer's grid what lies above its codes.

    Args:
        folder: A quantized checkpoint.

    Raises:
        ModelError: The adapter is no plain LoRA.
        CorruptArtifactError: A file of an overlay is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._scaling = adapter_scaling(folder)
        self._adapter = self._kept = None
        if self._scaling is not None:
            self._adapter = TensorFiles(folder, [folder / ADAPTER])
        if (folder / KEPT).is_file():
            self._kept = TensorFiles(folder, [folder / KEPT])
        self._where = str(folder)

    def check(self, layers: Mapping[str, Any]) -> None:
        """Refuse an overlay of anything but `layers`, for it would be lost."""
        adapted = [n.removeprefix(PREFIX).rpartition(".lora_")[0] for n in self._adapter or ()]
        kept = [name.rpartition("/")[0] for name in self._kept or ()]
        strays = [name for name in [*adapted, *kept] if name not in layers]
        if strays:
            what = f"an adapter or 16-bit weights of {strays[0]!r}, which is not quantized"
            raise ModelError(what, where=self._where, remedy="merge the adapter first")

    def nbytes(self, layer: str) -> int:
        """Return the stored bytes of what lies above a layer."""
        parts = [(self._adapter, f"{PREFIX}{layer}.lora_"), (self._kept, f"{layer}/")]
        return sum(
            entry.end - entry.begin
            for files, start in parts
            if files is not None
            for name, entry in files.entries.items()
            if name.startswith(start)
        )

    def on(self, layer: str, tensor: QuantizedTensor) -> QuantizedTensor:
        """Return a layer as deployed: its codes, and a grid that shows what lies above them."""
        down = f"{PREFIX}{layer}.lora_A.weight"
        if self._adapter is not None and self._scaling is not None and down in self._adapter:
            A, B = self._adapter[down], self._adapter[down.replace("lora_A", "lora_B")]
            tensor = QuantizedTensor(AdaptedGrid(tensor.grid, A, B, self._scaling), tensor.codes)
        if tiles := self.kept(layer, tensor.grid.shape):
            tensor = QuantizedTensor(KeptGrid(tensor.grid, *tiles.weights()), tensor.codes)
        return tensor

    def kept(self, layer: str, shape: tuple[int, int]) -> Tiles | None:
        """Return what is kept in 16 bits of a layer whose weight has `shape`; None if nothing.

        Raises:
            CorruptArtifactError: The file is damaged.
        """
        if self._kept is None or f"{layer}/values" not in self._kept:
            return None
        names = [name for name in self._kept if name.startswith(f"{layer}/")]
        parts = {name.rpartition("/")[2]: self._kept[name] for name in names}
        where = f"{self._where}/{KEPT}, {layer}"
        size, ids = unpack_positions(parts, where)
        values = parts["values"]
        if values.dim() == 1:
            values = values[:, None, None]
        tile = tuple(values.shape[1:])
        whole = len(tile) == 2 and min(tile) > 0 and fits(shape, tile)
        if not whole or size != count_tiles(shape, tile) or len(ids) != len(values):
            remedy = "copy or make the checkpoint again"
            raise CorruptArtifactError("lists of unequal length", where=where, remedy=remedy)
        return Tiles(shape, ids, values)


def adapter_scaling(folder: Path) -> float | None:
    """Return alpha / rank of the LoRA adapter in a folder; None without one.

    Raises:
        ModelError: It is malformed, or no plain LoRA.
        CorruptArtifactError: Its safetensors are missing.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    if not (folder / ADAPTER).is_file():
        remedy = f"save the adapter as {ADAPTER}; pickles are not read"
        raise CorruptArtifactError("an adapter without weights", where=str(folder), remedy=remedy)
    try:
        config = json.loads(path.read_text())
        scaling = float(config["lora_alpha"]) / int(config["r"])
    except (ValueError, KeyError, TypeError, ZeroDivisionError):
        raise ModelError("malformed adapter_config.json", where=str(folder)) from None
    for key, allowed in PLAIN.items():
        if config.get(key) not in (*allowed, None):
            what = f"an adapter with {key}: {config[key]}; patchable is plain LoRA"
            raise ModelError(what, where=str(folder), remedy="merge the adapter first")
    return scaling


def write_kept(folder: Path, kept: Mapping[str, Tiles]) -> None:
    """Write critical16.safetensors: layer -> its kept tiles, none of them empty."""
    tensors: dict[str, Tensor] = {}
    for layer, tiles in kept.items():
        parts = pack_positions(count_tiles(tiles.shape, tiles.tile), tiles.ids)
        single = tiles.tile == SINGLE
        parts["values"] = tiles.values.flatten() if single else tiles.values.contiguous()
        tensors |= {f"{layer}/{part}": value for part, value in parts.items()}
    save_file(tensors, str(folder / KEPT))


def decompress_on_load(folder: Path) -> None:
    """Let transformers decode a compressed-tensors checkpoint as it loads it.

    By default it does so in the first forward pass, and till then layers have no weight for PEFT
    to sit on.
    """
    config = read_config(folder)
    if config["quantization_config"].get("quant_method") == "compressed-tensors":
        config["quantization_config"]["dequantize"] = True
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))


def apply_kept(model: Any, folder: Path) -> None:
    """Put a checkpoint's 16-bit weights into the deployed model, which transformers left out.

    Where the loaded layer holds float weights they are replaced. Where it holds codes, whole rows
    are one dense product whose results take the place of those output features, and of other
    tiles what the codes lack is added: for blocks a dense product each, for single weights a
    sparse one.
    """
    from qresafe.hf.checkpoint import QuantizedCheckpoint

    checkpoint = QuantizedCheckpoint.open(folder)
    for name in checkpoint.names:
        tensor = checkpoint.read(name)
        if tiles := checkpoint.overlays.kept(name, tensor.grid.shape):
            _apply(model.get_submodule(name), tiles, tensor)


@torch.no_grad()  # type: ignore[untyped-decorator]
def _apply(layer: nn.Module, tiles: Tiles, tensor: QuantizedTensor) -> None:
    weight = getattr(layer, "weight", None)  # AQLM's layers have codes and codebooks instead
    if weight is not None and weight.is_floating_point() and tuple(weight.shape) == tiles.shape:
        positions, values = tiles.weights()
        weight.view(-1)[positions.to(weight.device)] = values.to(weight.device, weight.dtype)
        return
    device = next(layer.parameters()).device
    if tiles.are_rows:
        _replace_features(layer, tiles.ids.to(device), tiles.values[:, 0].float().to(device))
        return
    assert isinstance(tensor.grid, KeptGrid)
    beneath = tensor.grid.base.decode(tensor.codes).float()
    gap = tiles.values.float() - cut(beneath, tiles.tile)[tiles.ids]
    add = _add_weights if tiles.tile == SINGLE else _add_blocks
    add(layer, Tiles(tiles.shape, tiles.ids.to(device), gap.to(device)))


def _replace_features(layer: nn.Module, features: Tensor, weight: Tensor) -> None:
    """Let rows of 16-bit weights (features, in) make their output features."""

    def replace(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        bias = getattr(layer, "bias", None)
        made = nn.functional.linear(inputs[0].float(), weight)
        made = made if bias is None else made + bias[features]
        return output.index_copy(-1, features, made.to(output.dtype))

    layer.register_forward_hook(replace)


def _add_blocks(layer: nn.Module, gap: Tiles) -> None:
    """Add to the output what blocks are more than the codes beneath them."""
    rows, columns = gap.tile
    top, left = gap.corners()
    features = (top[:, None] + torch.arange(rows, device=top.device)).flatten()

    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen = inputs[0].float().unflatten(-1, (-1, columns))[..., left // columns, :]
        extra = torch.einsum("...tc,trc->...tr", seen, gap.values).flatten(-2)
        return output.index_add(-1, features, extra.to(output.dtype))

    layer.register_forward_hook(add)


def _add_weights(layer: nn.Module, gap: Tiles) -> None:
    """Add to the output what single weights are more than the codes beneath them."""
    places = torch.stack(gap.corners())
    matrix = torch.sparse_coo_tensor(
        places, gap.values.flatten(), gap.shape, check_invariants=True
    ).coalesce()

    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        rows = inputs[0].reshape(-1, gap.shape[1]).float()
        extra = torch.sparse.mm(matrix, rows.T).T
        return output + extra.reshape(output.shape).to(output.dtype)

    layer.register_forward_hook(add)
