"""Quantized checkpoints as they lie on disk: codes read exactly, and rewritten in place.

A patched model is a copy of Q0 in which only the bytes of code tensors differ, and of scales where
they were trained: same format, same size, and loaded by the same software, by construction.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from upath import UPath

from qresafe.core.grids import QuantizedTensor
from qresafe.core.scales import scale_of
from qresafe.errors import ModelError
from qresafe.hf.conv1d import conv1d_layers, straighten
from qresafe.hf.formats.base import Codec, ScaleCodec
from qresafe.hf.gguf_folder import gguf_file
from qresafe.hf.models import (
    check_folder,
    load_config,
    read_config,
    refuse_missing,
    take_decoding,
)
from qresafe.hf.overlaid import Overlays
from qresafe.hf.tensor_files import TensorFiles
from qresafe.leftovers import aside
from qresafe.registry import formats
from qresafe.storage import local_folder

SUPPORTED = (
    "compressed-tensors integers and FP8 (pack-quantized, int-quantized, float-quantized), "
    "bitsandbytes NF4, FP4 and LLM.int8(), AQLM, GPTQ, AWQ (gemm), GGUF Q8_0 and Q4_0"
)


class QuantizedCheckpoint(Mapping[str, QuantizedTensor]):
    """Layer name -> grid and codes, read from the files on access.

    A LoRA adapter or 16-bit weights in the folder show in the grids, see `qresafe.hf.overlaid`.

    Layer names are module names ("model.layers.0.self_attn.q_proj").
    """

    def __init__(self, folder: Path, files: TensorFiles, codec: Codec) -> None:
        self.folder, self.files, self.codec = folder, files, codec
        self._layers = dict.fromkeys(codec.layers)
        self.overlays = Overlays(folder)
        self.overlays.check(self._layers)

    @classmethod
    def open(cls, path: str | Path | UPath) -> QuantizedCheckpoint:
        """Recognise the format of a checkpoint folder and read its headers.

        Raises:
            ModelError: The model is not quantized, or in a format that is not supported.
            CorruptArtifactError: A weight file is damaged.
        """
        folder = local_folder(path)
        check_folder(folder)
        config = read_config(folder).get("quantization_config")
        if config is None:
            remedy = "quantize it first: qresafe quantize"
            raise ModelError("the model is not quantized", where=str(folder), remedy=remedy)
        files = _files(folder)
        codec = _codec(files, config)
        if not codec.layers:
            what = f"no {codec.name} layers in the weight files"
            raise ModelError(what, where=str(folder), remedy=f"patchable are {SUPPORTED}")
        return cls(folder, files, codec)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._layers)

    def read(self, name: str) -> QuantizedTensor:
        """Return one layer's grid and int8 codes, exactly as stored.

        Raises:
            ModelError: There is no quantized layer `name`, or its stored parts do not fit.
        """
        if name not in self._layers:
            raise ModelError(f"no quantized layer {name!r}", where=str(self.folder))
        try:
            return self.overlays.on(name, self.codec.read(name))
        except (KeyError, RuntimeError, ValueError) as error:
            what = f"layer {name} is incomplete or malformed ({error})"
            raise ModelError(what, where=str(self.folder)) from None

    def __getitem__(self, name: str) -> QuantizedTensor:
        if name not in self._layers:
            raise KeyError(name)
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def dtype(self) -> torch.dtype:
        """The type that decoded weights have: what the config says, else that of the scales."""
        stored = read_config(self.folder)
        name = stored.get("dtype") or stored.get("torch_dtype")
        if isinstance(name, str) and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        return self.read(self.names[0]).grid.dtype

    def plain_names(self) -> list[str]:
        """Return the stored tensors that belong to no quantized layer."""
        taken = {part for name in self.names for part in self.codec.tensors(name)}
        return [name for name in self.files if name not in taken]

    def dense_state_dict(
        self, dtype: torch.dtype | None = None, *, shells: bool = False
    ) -> dict[str, Tensor]:
        """Return all weights as floats, under the names of the full-precision model.

        Args:
            dtype: Of the weights; None for the checkpoint's own.
            shells: Give quantized weights as zeros that take no memory.
        """
        wanted = dtype or self.dtype
        plain = {name: self.files[name] for name in self.plain_names()}
        state = {name: t.to(wanted) if t.is_floating_point() else t for name, t in plain.items()}
        across = conv1d_layers(self.folder)
        for name in self.names:
            layer = self.read(name)
            empty = torch.zeros((), dtype=wanted).expand(layer.grid.shape)
            weight = empty if shells else layer.dense().to(wanted)
            state[f"{name}.weight"] = _turned(weight) if name in across else weight
        return state

    def rewrite(
        self,
        target: str | Path,
        codes: Mapping[str, Tensor],
        check: Callable[[Path], None] | None = None,
        scales: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Copy the checkpoint byte for byte, but with new codes, and scales, in some layers.

        Layers are read, packed and written one at a time. `target` appears whole or not at all.

        Args:
            target: Local folder to make; one that exists is replaced.
            codes: Layer name -> integer codes (out, in) within the layer's range.
            check: Called with the finished folder before it takes its name; may raise.
            scales: Layer name -> scales as its grid has them, type and shape.

        Raises:
            ModelError: An unknown layer, a wrong shape, a code out of range, a scale that is not
                finite, or a format that stores no plain scales.
        """
        target = Path(target)
        with built_aside(target) as copy:
            for file in self.folder.iterdir():
                if file.is_file():
                    shutil.copyfile(file, copy / file.name)
            for name, changed in codes.items():
                self._check_codes(name, changed)
                tensor, packed = self.codec.pack(name, changed)
                self.files.overwrite(copy, tensor, packed)
            for name, scale in (scales or {}).items():
                self.files.overwrite(copy, *self.pack_scale(name, scale))
            if check is not None:
                check(copy)
        return target

    def require_scales(self) -> None:
        """Refuse a checkpoint whose scales a patch cannot change.

        Raises:
            ModelError: The format does not store them as they are, or an adapter or 16-bit weights
                lie above the codes.
        """
        self._scale_codec()

    @property
    def has_scales(self) -> bool:
        """Whether a patch can change the scales."""
        above = any(self.overlays.nbytes(name) for name in self.names)
        return isinstance(self.codec, ScaleCodec) and not above

    def pack_scale(self, name: str, scale: Tensor) -> tuple[str, Tensor]:
        """Return (name, value) of the stored tensor that holds a layer's scales.

        Raises:
            ModelError: As `require_scales`; an unknown layer; scales of another type or shape than
                its grid has, or not finite.
        """
        codec, where = self._scale_codec(), str(self.folder)
        old = scale_of(self.read(name).grid, f"layer {name!r}")
        if (scale.dtype, scale.shape) != (old.dtype, old.shape):
            found, meant = (f"{one.dtype} {tuple(one.shape)}" for one in (scale, old))
            raise ModelError(f"scales of {name} are {found}, not {meant}", where=where)
        if not torch.isfinite(scale).all():
            raise ModelError(f"a scale of {name} is not finite", where=where)
        return codec.pack_scale(name, scale)

    def _scale_codec(self) -> ScaleCodec:
        if isinstance(self.codec, ScaleCodec) and self.has_scales:
            return self.codec
        why = "lie under an adapter or 16-bit weights"
        why = why if isinstance(self.codec, ScaleCodec) else "are not stored as they are"
        what = f"the scales of these {self.codec.name} weights {why}"
        raise ModelError(what, where=str(self.folder), remedy="set patch.trains to codes")

    def _check_codes(self, name: str, codes: Tensor) -> None:
        grid = self.read(name).grid
        where = str(self.folder)
        if codes.is_floating_point() or tuple(codes.shape) != grid.code_shape:
            found = f"{codes.dtype} {tuple(codes.shape)}"
            what = f"codes of {name} are {found}, not int {grid.code_shape}"
            raise ModelError(what, where=where)
        if int(codes.min()) < grid.low or int(codes.max()) > grid.high:
            raise ModelError(f"a code of {name} is outside [{grid.low}, {grid.high}]", where=where)


def _files(folder: Path) -> TensorFiles:
    if gguf_file(folder) is None:
        return TensorFiles(folder)
    from qresafe.hf.formats.gguf import GgufFiles

    return GgufFiles(folder)


def _codec(files: TensorFiles, config: Any) -> Codec:
    method = config.get("quant_method") if isinstance(config, Mapping) else None
    if method not in formats.names:
        what = f"the quantization method {method!r} is not supported"
        raise ModelError(what, where=str(files.folder), remedy=f"patchable are {SUPPORTED}")
    codec: Codec = formats.get(method)(files, config)
    return codec


@contextmanager
def built_aside(target: Path) -> Iterator[Path]:
    """Give an empty folder beside `target` that takes its place when the block ends well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(aside(target.name))
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        yield scratch
        if target.exists():
            shutil.rmtree(target)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def bits_per_weight(path: str | Path | UPath, also: Sequence[str] = ()) -> float:
    """Return the stored bits of quantized layers per weight of theirs.

    Counted are codes, scales, zero points and all else that a format stores of a layer, with its
    adapter and its 16-bit weights; not what is stored once per file.

    Args:
        path: A folder that `QuantizedCheckpoint.open` recognises.
        also: Layers that were left unquantized by a choice which the figure is to pay for.
    """
    checkpoint = QuantizedCheckpoint.open(path)
    entries = checkpoint.files.entries
    stored = {name: checkpoint.codec.tensors(name) for name in checkpoint.names}
    stored |= {name: (f"{name}.weight",) for name in also}
    size = sum(
        entries[part].end - entries[part].begin for parts in stored.values() for part in parts
    )
    size += sum(checkpoint.overlays.nbytes(name) for name in checkpoint.names)
    weights = sum(math.prod(checkpoint.read(name).grid.shape) for name in checkpoint.names)
    weights += sum(math.prod(entries[f"{name}.weight"].shape) for name in also)
    return 8 * size / weights


def _turned(weight: Tensor) -> Tensor:
    return weight.T.contiguous() if weight.is_contiguous() else weight.T  # a shell stays one


def load_dense(
    path: str | Path | UPath, dtype: torch.dtype | None = None
) -> tuple[Any, dict[str, QuantizedTensor]]:
    """Load a quantized checkpoint as an ordinary model with decoded float weights.

    Args:
        path: A folder that `QuantizedCheckpoint.open` recognises.
        dtype: Of the weights; None for the checkpoint's own.

    Returns:
        The HF model with plain `nn.Linear` layers and no quantization config, in evaluation mode,
        and every quantized layer's grid and codes by module name.
    """
    checkpoint = QuantizedCheckpoint.open(path)
    model = _load(checkpoint, dtype, shells=False)
    return model, {name: checkpoint.read(name) for name in checkpoint.names}


def load_frame(path: str | Path | UPath) -> tuple[Any, QuantizedCheckpoint]:
    """Load a quantized checkpoint without its quantized weights: what `attach` starts from.

    Returns:
        The HF model as `load_dense` makes it, in which the weights of the quantized layers are
        zeros that take no memory, and the checkpoint, which reads a layer when it is asked.
    """
    checkpoint = QuantizedCheckpoint.open(path)
    return _load(checkpoint, None, shells=True), checkpoint


def _load(checkpoint: QuantizedCheckpoint, dtype: torch.dtype | None, *, shells: bool) -> Any:
    wanted = dtype or checkpoint.dtype
    state = checkpoint.dense_state_dict(wanted, shells=shells)
    model = model_from_state(checkpoint.folder, state, wanted)
    straighten(model, checkpoint.names)
    modules = dict(model.named_modules())
    lost = [name for name in checkpoint.names if name not in modules]
    if lost:
        what = f"the loaded model has no module {lost[0]}"
        raise ModelError(what, where=str(checkpoint.folder), remedy="use a plain causal LM")
    return model


def model_from_state(folder: Path, state: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """Return the full-precision model that `folder`'s config describes, with weights `state`."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = load_config(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        what = f"{type(config).__name__} is not a causal language model"
        raise ModelError(what, where=str(folder))
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, loaded = kind.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    refuse_missing(loaded, folder)
    take_decoding(model, folder)
    return model.eval()
