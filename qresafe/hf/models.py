"""Models and tokenizers by name: found, checked and loaded as a user would deploy them."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upath import UPath

from qresafe.artifacts import hash_file
from qresafe.errors import CorruptArtifactError, ModelError
from qresafe.hf.decoded import decoded_because, load_decoded
from qresafe.hf.files import check_files, check_names, warn_of_code
from qresafe.hf.gguf_folder import check_gguf, gguf_file, is_unpacked, unpacked
from qresafe.hf.hub import hub_gguf, hub_snapshot, is_hub_gguf
from qresafe.hf.spread import is_spread, placing, require_inside
from qresafe.hf.template_probe import check_template
from qresafe.specs import ModelSpec
from qresafe.storage import local_folder

KEPT = "critical16.safetensors"  # 16-bit weights, see `qresafe.hf.overlaid`
ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = (".safetensors", ".gguf")
CONTENT = (*WEIGHTS, ".json", ".jinja", ".model", ".txt", ".py")


@dataclass(frozen=True)
class ModelRef:
    """A model that is present on this machine.

    Attributes:
        path: Folder with config, tokenizer and safetensors, or a .gguf file in their place.
        name: What the user called it: "embedded", a folder, a .gguf file, a hub id, or
            "owner/name/file.gguf".
        revision: The hub commit, for hub models; it makes `on_this_machine` repeatable.
        dtype: "auto" or a torch dtype's name.
        trust_remote_code: Whether the user allowed the model's own Python code to run.
    """

    path: str
    name: str
    revision: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False

    def on_this_machine(self) -> ModelRef:
        """Return a reference that is valid here; a worker on another host downloads its own."""
        if Path(self.path).is_dir():
            return self
        spec = ModelSpec.model_validate(
            {
                "path": self.name,
                "revision": self.revision,
                "dtype": self.dtype,
                "trust_remote_code": self.trust_remote_code,
            }
        )
        return resolve(spec, f"model.path on host {socket.gethostname()}")


def resolve(spec: ModelSpec, key: str = "model.path") -> ModelRef:
    """Find the model that a spec names and check its files, without loading weights.

    Args:
        spec: What the user wrote.
        key: Where, for error messages.

    Raises:
        ModelError: Neither a folder nor reachable on the hub, or no usable safetensors.
        CorruptArtifactError: A weight file is truncated.
    """
    folder, revision = _folder(spec, key)
    check_folder(folder)
    if spec.trust_remote_code:
        warn_of_code(folder, key)
    return ModelRef(str(folder), spec.path, revision, spec.dtype, spec.trust_remote_code)


def _folder(spec: ModelSpec, key: str) -> tuple[Path, str | None]:
    if spec.path == "embedded":
        from qresafe.embedded.build import embedded_model_path

        return Path(embedded_model_path()), None
    if "://" in spec.path:
        return local_folder(spec.path), None
    path = Path(spec.path).expanduser()
    if gguf := gguf_file(path):
        return path.resolve() if is_unpacked(path) else unpacked(gguf), None
    if path.is_dir():
        return path.resolve(), None
    if is_hub_gguf(spec.path):
        file, commit = hub_gguf(spec.path, spec.revision)
        return unpacked(file), commit
    if spec.path.startswith((".", "/", "~")) or spec.path.count("/") > 1 or path.exists():
        kind = "file" if path.suffix == ".gguf" else "folder"
        remedy = "give an existing folder with config.json and *.safetensors, or a hub id"
        raise ModelError(f"no model {kind} {spec.path!r}", where=key, remedy=remedy)
    return hub_snapshot(spec.path, spec.revision)


def check_folder(folder: str | Path) -> None:
    """Check config and weight files in milliseconds: presence, pickles, truncation.

    Raises:
        ModelError: config.json is missing or malformed, or there are no safetensors.
        CorruptArtifactError: A shard is missing or shorter than its header says.
    """
    folder = Path(folder)
    if folder.is_dir():
        check_files(folder, WEIGHTS, CONTENT)
    config = read_config(folder)
    if "model_type" not in config:
        remedy = "give a transformers causal language model"
        raise ModelError("config.json names no model_type", where=str(folder), remedy=remedy)
    if gguf := gguf_file(folder):
        return check_gguf(gguf)
    for shard in weight_files(folder):
        _check_shard(shard)
    return None


def read_config(folder: str | Path) -> dict[str, Any]:
    """Return a model folder's config.json.

    Raises:
        ModelError: It is missing or no JSON object.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        remedy = "give a folder that holds a saved transformers model"
        raise ModelError("no config.json", where=str(folder), remedy=remedy) from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"malformed config.json ({error})", where=str(folder)) from None
    if not isinstance(config, dict):
        raise ModelError("config.json is no JSON object", where=str(folder))
    return config


def weight_files(folder: str | Path) -> list[Path]:
    """Return a model's safetensors files: the single one, or the shards of its index.

    Raises:
        ModelError: There are none (pickled weights are refused by name), or one is missing.
    """
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():  # transformers' order; other *.safetensors beside it are not the model
        return [single]
    shards: list[Path] = []
    if index.is_file():
        try:
            names = list(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ModelError("malformed model.safetensors.index.json", where=str(folder)) from None
        shards = [folder / name for name in check_names(names, folder)]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CorruptArtifactError(
            f"missing weight file {missing[0]}", where=str(folder), remedy="copy the model again"
        )
    if not shards:
        raise _no_weights(folder)
    return shards


def _no_weights(folder: Path) -> ModelError:
    pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
    if pickled:
        remedy = "convert them with save_pretrained(..., safe_serialization=True)"
        what = "the weights are pickle files, which can run code when loaded"
        return ModelError(what, where=str(folder), remedy=remedy)
    remedy = "give a folder with model.safetensors, or its shards and their index"
    return ModelError("no weights", where=str(folder), remedy=remedy)


def _check_shard(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        remedy = "copy or download the model again"
        raise CorruptArtifactError(
            f"damaged weight file ({error})", where=str(path), remedy=remedy
        ) from None


def load_model(
    path: str | Path | UPath,
    *,
    dtype: Any = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    classifier: bool = False,
    scratch: Path | None = None,
) -> Any:
    """Load a causal LM by plain transformers, as a user would deploy it, in evaluation mode.

    Quantized checkpoints run through their own libraries, or, where these are not installed
    (GPTQ, AWQ), or slow (AQLM on a CPU), with decoded weights and a warning. On CPUs with
    AVX512-BF16, bitsandbytes repacks 4-bit weights at the first forward pass, after which its
    modules must be neither dequantized nor saved: `qresafe.hf.checkpoint` reads codes from the
    files for that reason.

    Args:
        path: Model folder; a remote one is downloaded once.
        dtype: "auto" (what the checkpoint says), a torch dtype or its name.
        device: A torch device, e.g. "cpu" or "cuda:0"; several GPUs, see `qresafe.hf.spread`; or
            "disk", see `qresafe.hf.offloaded`.
        trust_remote_code: Run Python code that comes with the model.
        classifier: The model is a sequence classifier instead.
        scratch: Folder for weights that change, on device "disk".

    Raises:
        ModelError: transformers cannot load it, or would fill missing weights at random.
        ResourceError: The weights do not fit on several GPUs.
        CorruptArtifactError: A weight file is damaged.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    folder = local_folder(path)
    check_folder(folder)
    _check_adapter(folder)
    if reason := decoded_because(read_config(folder), device):
        return load_decoded(folder, dtype, device, reason)
    placed = placing(device)
    if scratch is not None:
        placed |= {"offload_folder": str(scratch), "offload_buffers": True}
    gguf = gguf_file(folder)
    try:
        model, loaded = kind.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **({"gguf_file": gguf.name} if gguf else {}),
            **placed,
        )
    except Exception as error:  # whatever a config's odd values lead to
        raise _load_failure(error, folder) from error
    refuse_missing(loaded, folder)
    if gguf:
        take_decoding(model, folder)
    if is_spread(device):
        require_inside(model.hf_device_map, str(folder))
    if (folder / KEPT).is_file():
        from qresafe.hf.overlaid import apply_kept

        apply_kept(model, folder)
    return model.eval()


def _check_adapter(folder: Path) -> None:
    """Refuse an adapter in pickles, which PEFT would read."""
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "adapter_model.safetensors").is_file():
        remedy = "save the adapter as adapter_model.safetensors"
        raise ModelError("an adapter without safetensors", where=str(folder), remedy=remedy)


def beside_the_codes(folder: str | Path | UPath) -> str | None:
    """Return the file by which a checkpoint is more than its codes; other servers ignore it."""
    return next((n for n in (ADAPTER_CONFIG, KEPT) if (UPath(folder) / n).is_file()), None)


def runs_own_code(folder: Path) -> bool:
    """Return whether a model is of a kind that transformers does not know by itself."""
    from transformers import CONFIG_MAPPING

    config = read_config(folder)
    return "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING


def take_decoding(model: Any, folder: Path) -> None:
    """Give a model that was not loaded from `folder` by name the end tokens that lie there."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)


def refuse_missing(loaded: dict[str, Any], folder: Path) -> None:
    """Refuse a model that lacks weights: transformers would draw those at random.

    Args:
        loaded: What `from_pretrained(..., output_loading_info=True)` returns second.
        folder: For the message.

    Raises:
        ModelError: A weight is missing or has another shape.
    """
    missing = sorted(loaded["missing_keys"]) + sorted(str(m) for m in loaded["mismatched_keys"])
    if missing:
        what = f"{len(missing)} weights are missing or misshapen, {missing[0]} first"
        raise ModelError(what, where=str(folder), remedy="use a complete copy of the model")


def load_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """Return transformers' own config object of a model folder.

    Raises:
        ModelError: transformers does not know the model type, or does not take a value.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # whatever a config's odd values lead to
        raise _load_failure(error, folder) from error


def _load_failure(error: Exception, folder: Path) -> ModelError:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        remedy = "read that code, then set model.trust_remote_code: true"
        return ModelError("the model needs its own Python code", where=str(folder), remedy=remedy)
    return ModelError(f"transformers cannot load the model ({text[:300]})", where=str(folder))


def load_tokenizer(
    path: str | Path | UPath, *, trust_remote_code: bool = False, chat: bool = True
) -> Any:
    """Load a tokenizer that can render chats and pad.

    Args:
        path: Model folder; a remote one is downloaded once.
        trust_remote_code: Run Python code that comes with the tokenizer.
        chat: Whether it must render chats; a judge's prompt may be rendered for it.

    Raises:
        ModelError: There is no tokenizer, or no chat template or end token where `chat`.
    """
    from transformers import AutoTokenizer

    folder = local_folder(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # tokenizers raises bare Exception on malformed files
        text = " ".join(str(error).split())[:200]
        remedy = "copy the tokenizer's files beside config.json"
        raise ModelError(
            f"no usable tokenizer ({text})", where=str(folder), remedy=remedy
        ) from None
    if not chat:
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return tokenizer
    if not tokenizer.chat_template:
        remedy = "use the chat variant of the model, or add chat_template.jinja to the folder"
        raise ModelError("the tokenizer has no chat template", where=str(folder), remedy=remedy)
    check_template(tokenizer, str(folder))
    if tokenizer.eos_token is None:
        remedy = "set eos_token in tokenizer_config.json"
        raise ModelError("the tokenizer has no end token", where=str(folder), remedy=remedy)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def context_length(path: str, trust_remote_code: bool = False) -> int | None:
    """Return how many positions a model was made for; None if its config does not say."""
    config = load_config(local_folder(path), trust_remote_code)
    length = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def fingerprint(path: str | Path | UPath) -> str:
    """Return a 16-hex-digit hash of all that decides a model's answers: weights, config, tokenizer.

    File hashes are remembered within the process by path, size and time of change.
    """
    folder = local_folder(path)
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in CONTENT and file.is_file():
            state = os.stat(file)
            digest.update(file.name.encode() + b"\0")
            digest.update(_file_hash(str(file), state.st_size, state.st_mtime_ns).encode())
    return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=4096)
def _file_hash(path: str, size: int, changed: int) -> str:
    return hash_file(Path(path))
