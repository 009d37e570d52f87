"""Model folders written tensor by tensor: quantized ones, and decoded ones in full precision.

One tensor is in memory at a time, so models larger than memory pass through.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from qresafe.core.grids import QuantizedTensor, UniformGrid
from qresafe.errors import ModelError
from qresafe.hf.checkpoint import QuantizedCheckpoint, built_aside
from qresafe.hf.conv1d import conv1d_layers
from qresafe.hf.models import (
    ADAPTER_CONFIG,
    CONTENT,
    WEIGHTS,
    load_config,
    read_config,
)
from qresafe.hf.shards import INDEX, write_shards
from qresafe.hf.tensor_files import TensorFiles

LATENTS = "latents.safetensors"
KV_LAYERS = ("re:.*k_proj$", "re:.*v_proj$")
FORMAT = "pack-quantized"  # compressed-tensors packs every width from 2 to 8 bits densely


@dataclass(frozen=True)
class Scheme:
    """How a whole model's linear layers are stored.

    Attributes:
        bits: Code width, 2 to 8.
        group_size: Weights per scale along the row; -1 one per row.
        symmetric: No zero points.
        activation_bits: 16, or the width to which the deployed model rounds the inputs of its
            quantized layers, per token, at run time.
        kv_bits: 16, or the width to which it rounds keys (before rotation) and values, per token.
    """

    bits: int
    group_size: int
    symmetric: bool
    activation_bits: int = 16
    kv_bits: int = 16


def linear_layers(folder: Path) -> list[str]:
    """Return the names of a causal LM's `nn.Linear` modules, without loading its weights."""
    modules = meta_model(folder).named_modules()
    return [name for name, module in modules if isinstance(module, nn.Linear)]


def meta_model(folder: Path) -> nn.Module:
    """Return a causal LM's modules, without weights.

    Raises:
        ModelError: The folder holds another kind of model.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(folder)
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config)
    except ValueError:
        what = f"{type(config).__name__} is not a causal language model"
        raise ModelError(what, where=str(folder)) from None
    return model


def refuse_infinite(layer: str, weight: Tensor) -> None:
    """Raise a ModelError if `weight` holds NaN or infinity: no grid can be fitted to it."""
    if not torch.isfinite(weight).all():
        remedy = "use an intact copy of the model"
        raise ModelError(f"{layer} has weights that are not finite", remedy=remedy)


def write_quantized(
    target: Path, source: Path, quantized: Mapping[str, QuantizedTensor], scheme: Scheme
) -> None:
    """Write a compressed-tensors checkpoint that plain transformers loads.

    Args:
        target: Local folder to make.
        source: The full-precision model; everything that is not in `quantized` is taken from it
            unchanged, its tokenizer and generation settings too.
        quantized: Layer name -> grid and codes; may compute them on access (each is read once).
        scheme: What all of `quantized` have in common.

    Raises:
        ModelError: A layer of `quantized` is not among the source's weights.
    """
    files = TensorFiles(source)
    stored = {f"{name}.weight": name for name in quantized}
    lost = sorted(set(stored) - set(files))
    if lost:
        raise ModelError(f"no weight {lost[0]!r}", where=str(source), remedy="list it in skip")

    def convert(name: str) -> dict[str, Tensor]:
        if name not in stored:
            return {name: files[name]}
        return _packed(stored[name], quantized[stored[name]], scheme)

    ignore = [name for name in linear_layers(source) if name not in quantized]
    config = read_config(source) | {"quantization_config": _config(scheme, ignore)}
    _write(target, files, convert, config)


def write_dense(
    target: Path,
    checkpoint: QuantizedCheckpoint,
    adjust: Callable[[str, Tensor], Tensor],
    dtype: torch.dtype | None = None,
) -> None:
    """Write a quantized checkpoint's decoded weights as an ordinary full-precision model.

    Args:
        target: Local folder to make.
        checkpoint: Q0.
        adjust: Given (layer name, decoded float32 weight), returns the weight to store.
        dtype: Of the stored weights; None for the checkpoint's own.
    """
    wanted = dtype or checkpoint.dtype
    files, codec = checkpoint.files, checkpoint.codec
    owner = {part: name for name in checkpoint.names for part in codec.tensors(name)}
    leading = {codec.tensors(name)[0] for name in checkpoint.names}
    across = conv1d_layers(checkpoint.folder)

    def convert(name: str) -> dict[str, Tensor]:
        if name not in owner:
            return {name: files[name]}
        if name not in leading:
            return {}
        layer = owner[name]
        weight = adjust(layer, checkpoint.read(layer).dense().float())
        weight = weight.T if layer in across else weight
        return {f"{layer}.weight": weight.to(wanted).contiguous()}

    config = read_config(checkpoint.folder)
    del config["quantization_config"]
    _write(target, files, convert, config)


@dataclass(frozen=True)
class AqlmLayer:
    """A layer's codes (out, in / group, M), codebooks (M, 2^bits, group) and scales (out, 1)."""

    codes: Tensor
    codebooks: Tensor
    scales: Tensor

    @property
    def width(self) -> int:
        """Inputs of the layer."""
        return int(self.codes.shape[1] * self.codebooks.shape[2])

    @property
    def nbytes(self) -> int:
        """Stored bytes, codebooks and scales with the codes."""
        return int(self.codes.nbytes + self.codebooks.nbytes + self.scales.nbytes)


def write_aqlm(
    target: Path,
    source: Path,
    layers: Mapping[str, AqlmLayer],
    replaced: Mapping[str, Tensor],
    scheme: Mapping[str, int],
) -> None:
    """Write an AQLM checkpoint that transformers loads with the `aqlm` package.

    Args:
        target: Local folder to make.
        source: The full-precision model.
        layers: Layer name -> what is stored of it.
        replaced: Tensor name -> new value of other tensors, stored in the type of the old one.
        scheme: Sizes, as transformers' `AqlmConfig` names them.
    """
    files = TensorFiles(source)

    def convert(name: str) -> dict[str, Tensor]:
        layer = name.removesuffix(".weight")
        if name == layer or layer not in layers:
            value = replaced.get(name, files[name])
            return {name: value.detach().cpu().to(files.entries[name].dtype).contiguous()}
        made = layers[layer]
        return {
            f"{layer}.codes": made.codes.contiguous(),
            f"{layer}.codebooks": made.codebooks[:, :, None].contiguous(),
            f"{layer}.scales": made.scales[:, :, None, None].contiguous(),
        }

    ignore = [name for name in linear_layers(source) if name not in layers]
    quantization = {"quant_method": "aqlm", "linear_weights_not_to_quantize": ignore, **scheme}
    config = read_config(source) | {"quantization_config": quantization}
    _write(target, files, convert, config)


def write_plain(target: Path, source: Path, weights: Mapping[str, Tensor]) -> None:
    """Write a copy of a full-precision model with some of its weights replaced.

    Args:
        target: Local folder to make.
        source: The model to copy.
        weights: Tensor name -> new value; stored in the type of the old one.
    """
    files = TensorFiles(source)

    def convert(name: str) -> dict[str, Tensor]:
        old = files[name]
        return {name: weights[name].detach().cpu().to(old.dtype) if name in weights else old}

    _write(target, files, convert, read_config(source))


def write_latents(target: Path, latents: Mapping[str, Tensor]) -> None:
    """Write layer -> latent weight as `read_latents` reads them, in float32.

    In 16 bits some of them would round to other codes.
    """
    target.mkdir(parents=True, exist_ok=True)
    wide = {name: latent.float().contiguous() for name, latent in latents.items()}
    save_file(wide, str(target / LATENTS))


def read_latents(folder: Path) -> TensorFiles:
    """Return layer -> float32 latent weight (out, in), read on access."""
    return TensorFiles(folder, [folder / LATENTS])


def write_halved(target: Path, source: Path, layers: Sequence[str]) -> None:
    """Write a copy of a checkpoint that stores the weights of some plain layers in 16 bits.

    transformers loads them in the type that config.json names, as it does every weight.
    """
    files = TensorFiles(source)
    halved = {f"{layer}.weight" for layer in layers}

    def convert(name: str) -> dict[str, Tensor]:
        return {name: in_16_bits(files[name]) if name in halved else files[name]}

    _write(target, files, convert, read_config(source))


def in_16_bits(weight: Tensor) -> Tensor:
    """Return a weight in 16 bits: as it is, else as float16, or bfloat16 where that overflows."""
    if weight.dtype in (torch.float16, torch.bfloat16):
        return weight
    half = weight.to(torch.float16)
    return half if torch.isfinite(half).all() else weight.to(torch.bfloat16)


def _packed(layer: str, tensor: QuantizedTensor, scheme: Scheme) -> dict[str, Tensor]:
    grid = tensor.grid
    if not isinstance(grid, UniformGrid):
        raise TypeError(f"{layer}: {FORMAT} stores uniform grids only")
    parts = {
        "packed": pack_to_int32(tensor.codes, grid.bits),
        "scale": grid.scale,
        "shape": torch.tensor(grid.shape),
    }
    if not scheme.symmetric:
        parts["zero_point"] = pack_to_int32(grid.zero, grid.bits, packed_dim=0)
    return {f"{layer}.weight_{part}": value.contiguous() for part, value in parts.items()}


def _config(scheme: Scheme, ignore: list[str]) -> dict[str, Any]:
    grouped = scheme.group_size > 0
    weights = QuantizationArgs(
        num_bits=scheme.bits,
        symmetric=scheme.symmetric,
        strategy="group" if grouped else "channel",
        group_size=scheme.group_size if grouped else None,
    )
    shared = {"weights": weights, "input_activations": _per_token(scheme.activation_bits)}
    groups = {"group_0": QuantizationScheme(targets=["Linear"], format=FORMAT, **shared)}
    if scheme.kv_bits < 16:
        rounded = _per_token(scheme.kv_bits)
        groups["group_1"] = QuantizationScheme(
            targets=list(KV_LAYERS), format=FORMAT, output_activations=rounded, **shared
        )
    config = QuantizationConfig(
        config_groups=groups, format=FORMAT, quantization_status="compressed", ignore=ignore
    )
    return dict(config.model_dump(mode="json"))


def _per_token(bits: int) -> QuantizationArgs | None:
    if bits >= 16:
        return None
    return QuantizationArgs(num_bits=bits, symmetric=True, strategy="token", dynamic=True)


def _write(
    target: Path,
    files: TensorFiles,
    convert: Callable[[str], dict[str, Tensor]],
    config: Mapping[str, Any],
) -> None:
    with built_aside(target) as folder:
        write_shards(folder, files, convert)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
        copy_sidecars(files.folder, folder)


def copy_sidecars(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template and generation settings; what is in `target` stays."""
    for file in source.iterdir():
        made = (target / file.name).exists() or file.suffix in WEIGHTS
        other = file.name in (INDEX, ADAPTER_CONFIG)  # of weights that are not copied
        if file.is_file() and file.suffix in CONTENT and not other and not made:
            shutil.copyfile(file, target / file.name)
