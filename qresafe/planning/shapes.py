"""The shapes of a model's weights: by name, from a folder's headers, or from its config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from qresafe.errors import ModelError, nearest
from qresafe.loading import read_yaml
from qresafe.specs import ModelSpec

FILE = Path(__file__).with_name("shapes.yaml")
# Architectures whose feed-forward part has two matrices instead of the gated three.
UNGATED = {"gpt_neox", "phi", "opt", "gpt2", "falcon", "bloom", "starcoder2"}
UNGATED |= {"gptj", "gpt_neo", "codegen", "gpt_bigcode", "mpt"}
# What other architectures call these keys: transformers' attribute_maps, and two inner widths.
ALIASES = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "intermediate_size": ("n_inner", "ffn_dim"),
}
TIED = {"gpt2", "opt", "bloom"}  # their config.json need not say so
POSITIONS = {"wpe", "embed_positions"}  # tables of positions: no linear layers
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelShape:
    """What memory and time depend on.

    Attributes:
        name: For people.
        hidden: Width of the residual stream.
        blocks: Number of decoder blocks.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Width of a head.
        feed_forward: Inner width of the feed-forward part.
        vocabulary: Rows of the output head.
        linears: (out, in) of every linear layer but the output head.
        other: Weights that are not in them: embeddings, output head, norms, biases.
        bytes: Of a stored weight.
    """

    name: str
    hidden: int
    blocks: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int
    linears: tuple[tuple[int, int], ...]
    other: int
    bytes: int = 2

    @cached_property
    def quantized(self) -> int:
        """Weights in the linear layers: what is quantized and patched."""
        return sum(rows * columns for rows, columns in self.linears)

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.quantized + self.other

    @cached_property
    def largest(self) -> int:
        """Weights of the largest linear layer."""
        return max((rows * columns for rows, columns in self.linears), default=0)

    def factors(self, rank: int) -> int:
        """Return the entries of all LoRA factors: (in + out) * rank per linear layer."""
        return rank * sum(rows + columns for rows, columns in self.linears)


def shape_of(model: ModelSpec) -> ModelShape:
    """Return the shape of the model that a spec names; nothing is ever downloaded.

    Raises:
        ModelError: Neither a folder, nor known by name, nor in the hub's cache.
    """
    _check_path(model.path)
    if (folder := _folder(model)) is not None:
        found = _from_folder(folder)
    elif (config := _known().get(model.path)) is not None:
        found = from_config(config, model.path)
    else:
        remedy = f"{nearest(model.path, _known())} (or give a folder with its config.json)"
        raise ModelError(f"the shape of {model.path!r} is not known", where="plan", remedy=remedy)
    if model.dtype == "auto":
        return found
    return _with_bytes(found, BYTES[model.dtype])


def from_config(config: Mapping[str, Any], name: str) -> ModelShape:
    """Return the shape that a config.json of a dense decoder describes.

    Raises:
        ModelError: A key that it takes is missing.
    """
    config = _renamed(config)
    try:
        hidden, blocks = int(config["hidden_size"]), int(config["num_hidden_layers"])
        heads, vocabulary = int(config["num_attention_heads"]), int(config["vocab_size"])
        ungated = config.get("model_type") in UNGATED
        inner = int(config.get("intermediate_size") or 4 * hidden)
    except (KeyError, TypeError, ValueError) as error:
        remedy = "give the folder of a Hugging Face causal language model"
        what = f"config.json does not describe a decoder ({error})"
        raise ModelError(what, where=name, remedy=remedy) from None
    kv_heads = int(config.get("num_key_value_heads") or heads)
    width = int(config.get("head_dim") or hidden // heads)
    experts = int(config.get("num_local_experts") or config.get("num_experts") or 1)
    attention = [
        (heads * width, hidden),
        *2 * [(kv_heads * width, hidden)],
        (hidden, heads * width),
    ]
    feed = [(inner, hidden)] * (1 if ungated else 2) + [(hidden, inner)]
    tied = bool(config.get("tie_word_embeddings", config.get("model_type") in TIED))
    stored = config.get("dtype") or config.get("torch_dtype")
    biases = (heads + 2 * kv_heads) * width if config.get("model_type") == "qwen2" else 0
    return ModelShape(
        name=name,
        hidden=hidden,
        blocks=blocks,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width,
        feed_forward=inner,
        vocabulary=vocabulary,
        linears=tuple((attention + feed * experts) * blocks),
        other=vocabulary * hidden * (1 if tied else 2)
        + hidden * (2 * blocks + 1)
        + biases * blocks,
        bytes=BYTES.get(str(stored), 2),
    )


def _renamed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config that has the usual keys where it has others for the same."""
    found = {
        key: config[alias] for key, names in ALIASES.items() for alias in names if alias in config
    }
    return found | dict(config)


@cache
def _known() -> dict[str, dict[str, Any]]:
    """Return hub id -> config of every model in shapes.yaml."""
    found = {}
    for name, entry in read_yaml(FILE.read_text("utf-8")).items():
        for alias in (name, *entry.get("same", ())):
            found[alias] = entry["config"]
    return found


def _check_path(path: str) -> None:
    """Refuse what can only be a local path, and leads nowhere.

    Raises:
        ModelError: There is nothing.
    """
    local = path.startswith((".", "/", "~")) or path.endswith("/") or path.count("/") > 1
    if local and "://" not in path and not Path(path).expanduser().exists():
        remedy = "give an existing folder with its config.json, or a hub id"
        raise ModelError(f"no model folder {path!r}", where="model.path", remedy=remedy)


def _folder(model: ModelSpec) -> Path | None:
    """Return the local folder of a model: embedded, a path, or the hub's cache; None: not here."""
    if model.path == "embedded":
        from qresafe.embedded.build import embedded_model_path

        return Path(embedded_model_path())
    path = Path(model.path).expanduser()
    if path.is_dir():
        return path
    if model.path in _known() or model.path.count("/") != 1:
        return None
    from huggingface_hub import errors, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
    except errors.HFValidationError:  # no hub id: told as a model that is not known
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _from_folder(folder: Path) -> ModelShape:
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        remedy = "give the folder of a Hugging Face model"
        what = f"no readable config.json ({error})"
        raise ModelError(what, where=str(folder), remedy=remedy) from None
    found = from_config(config.get("text_config") or config, str(folder))
    if "quantization_config" in config or not any(folder.glob("*.safetensors")):
        return found  # stored codes have other shapes than the weights that they stand for
    return _with_headers(found, folder)


def _with_headers(shape: ModelShape, folder: Path) -> ModelShape:
    """Return the shape with the linear layers and sizes that the weight files really hold."""
    from qresafe.hf.tensor_files import TensorFiles

    entries = TensorFiles(folder).entries
    sizes = {name: entry.shape for name, entry in entries.items()}
    linears = tuple(
        (size[0], size[1])
        for name, size in sizes.items()
        if len(size) == 2
        and name.endswith(".weight")
        and shape.vocabulary not in size
        and name.split(".")[-2] not in POSITIONS
    )
    total = sum(_product(size) for size in sizes.values())
    other = total - sum(rows * columns for rows, columns in linears)
    width = max((entry.dtype.itemsize for entry in entries.values()), default=2)
    return _changed(shape, linears=linears, other=other, bytes=width)


def _product(size: tuple[int, ...]) -> int:
    count = 1
    for length in size:
        count *= length
    return count


def _with_bytes(shape: ModelShape, width: int) -> ModelShape:
    return _changed(shape, bytes=width)


def _changed(shape: ModelShape, **changes: Any) -> ModelShape:
    # Not dataclasses.replace: it would not forget what cached_property has kept.
    fields = {name: getattr(shape, name) for name in ModelShape.__dataclass_fields__}
    return ModelShape(**(fields | changes))
