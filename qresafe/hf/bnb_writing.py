"""bitsandbytes checkpoints, quantized by the library itself: a tensor at a time where it can be."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qresafe.errors import ResourceError
from qresafe.hf.checkpoint import built_aside
from qresafe.hf.models import check_folder, refuse_missing
from qresafe.hf.shards import write_shards
from qresafe.hf.tensor_files import TensorFiles
from qresafe.hf.writing import copy_sidecars, refuse_infinite

Options = Mapping[str, Any]


def write_bitsandbytes(
    target: Path, source: Path, options: Options, advance: Callable[[], None]
) -> None:
    """Write a bitsandbytes checkpoint, with the bytes that transformers would save.

    One tensor of W is in memory at a time, but where its files hold other tensors than the model
    would save (gpt2's on the hub, a tied head that is stored twice): then transformers loads and
    saves the model as a whole.

    Args:
        target: Local folder to make.
        source: The full-precision model.
        options: Of transformers' `BitsAndBytesConfig`.
        advance: Called after each quantized layer.

    Raises:
        ResourceError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ResourceError("bitsandbytes is not installed", remedy="pip install bitsandbytes")
    check_folder(source)
    files = TensorFiles(source)
    layers = _Layers(source, options)
    if not layers.are_saved_as(files):
        save_whole(target, source, options)
        return

    def convert(name: str) -> Mapping[str, Tensor]:
        layer = name.removesuffix(".weight")
        if name == layer or layer not in layers.names:
            return {name: files[name].to(layers.dtype_of(name))}
        made = layers.quantized(layer, files[name])
        advance()
        return made

    with built_aside(target) as folder:
        write_shards(folder, files, convert)
        layers.save_configs(folder)
        copy_sidecars(source, folder)


class _Layers:
    """W without weights, its linear layers replaced by those of bitsandbytes."""

    def __init__(self, source: Path, options: Options) -> None:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig
        from transformers.quantizers.auto import AutoHfQuantizer

        model, loaded = AutoModelForCausalLM.from_pretrained(
            source,
            dtype="auto",
            device_map={"": "meta"},
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        refuse_missing(loaded, source)
        self.model, self._ignored = model, loaded["unexpected_keys"]
        self._dtypes = {name: value.dtype for name, value in model.named_parameters()}
        settings = model.config.quantization_config = BitsAndBytesConfig(**options)
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
        quantizer.preprocess_model(model=model, dtype=model.dtype, device_map={"": _device()})
        self._operation = quantizer.get_quantize_ops()
        self.names = {n for n, m in model.named_modules() if hasattr(m, "source_cls")}

    def are_saved_as(self, files: TensorFiles) -> bool:
        """Return whether `files` hold just what the model would save, by the same names."""
        found = all(f"{name}.weight" in files for name in self.names)
        return (
            found and not self._ignored and not set(self.model.all_tied_weights_keys) & set(files)
        )

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the type in which transformers loads, and so saves, a tensor."""
        return self._dtypes.get(name, self.model.dtype)

    def quantized(self, layer: str, weight: Tensor) -> dict[str, Tensor]:
        """Return what is stored of a layer in the place of its weight."""
        refuse_infinite(layer, weight)
        name, module = f"{layer}.weight", self.model.get_submodule(layer)
        empty, bias = module.weight, module.bias
        weight = weight.to(self.dtype_of(name)).to(_device())
        made = self._operation.convert({name: [weight]}, full_layer_name=name, model=self.model)
        module.weight, module.bias = made[name], None
        stored = {
            part: value.cpu() for part, value in module.state_dict(prefix=f"{layer}.").items()
        }
        module.weight, module.bias = empty, bias
        return stored

    def save_configs(self, folder: Path) -> None:
        """Write the model's settings as `save_pretrained` does."""
        self.model.config.dtype = str(self.model.dtype).removeprefix("torch.")
        self.model.config.architectures = [type(self.model).__name__]
        self.model.config.save_pretrained(folder)
        self.model.generation_config.save_pretrained(folder)


def save_whole(target: Path, source: Path, options: Options) -> None:
    """Write a bitsandbytes checkpoint of a model that is loaded, quantized and saved as a whole.

    It is saved before any forward pass: on CPUs with AVX512-BF16 the first one repacks 4-bit
    weights, and what is saved afterwards is silently wrong.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model, loaded = AutoModelForCausalLM.from_pretrained(
        source,
        quantization_config=BitsAndBytesConfig(**options),
        dtype="auto",
        device_map={"": _device()},
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    refuse_missing(loaded, source)
    with built_aside(target) as folder:
        model.save_pretrained(folder)
        copy_sidecars(source, folder)


def _device() -> str:
    return "cuda:0" if torch.cuda.is_available() else "cpu"
