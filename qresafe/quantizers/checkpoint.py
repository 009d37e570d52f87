"""No quantizer: a quantized checkpoint that exists already takes the place of Q0.

Its files are linked (copied where the storage is another file system), so it takes no room.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qresafe.errors import ModelError
from qresafe.hf.checkpoint import QuantizedCheckpoint
from qresafe.hf.decoded import decoded_because
from qresafe.hf.gguf_folder import gguf_file
from qresafe.hf.models import CONTENT, ModelRef, read_config, resolve
from qresafe.hf.tensor_files import TensorFiles
from qresafe.hf.writing import copy_sidecars
from qresafe.progress import Progress, Silent
from qresafe.quantize_specs import CheckpointSpec
from qresafe.quantizers.base import CHECKPOINT, QuantizeResult
from qresafe.registry import formats
from qresafe.specs import ModelSpec
from qresafe.storage import local_folder

# Of config.json: what makes two checkpoints weights of one model.
SAME = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads"),
)


def quantize(
    model_path: str | Path,
    target: Path,
    spec: CheckpointSpec,
    *,
    control: bool = True,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Make `target/checkpoint` of links to the checkpoint's files; see `Quantizer`.

    A .gguf file gets W's tokenizer, and so does a folder without one: both must read the same
    prompts.

    Raises:
        ModelError: No such checkpoint, it is not quantized, or of another model than W.
        CorruptArtifactError: A file is damaged.
    """
    source, shown = local_folder(model_path), progress or Silent()
    shown.start("read checkpoint", 1, "checkpoint")
    found = Path(find(spec, source).path)
    made = target / CHECKPOINT
    made.mkdir()
    own = gguf_file(found) is None
    for file in sorted(found.iterdir()):
        wanted = file.suffix in CONTENT if own else file.suffix == ".gguf"
        if file.is_file() and (wanted or file.name == "config.json"):
            _link(file.resolve(), made / file.name)
    if not own or not any(made.glob("tokenizer*")):
        copy_sidecars(source, made)
    counts = {"source": spec.path} | _counts(made)
    shown.advance(note=str(counts.get("runs") or ""))
    return QuantizeResult(counts)


def planned(source: Path, spec: CheckpointSpec) -> list[str]:
    """Check that the checkpoint is one of `source`; which layers it has is its own affair."""
    find(spec, source)
    return []


def find(spec: CheckpointSpec, source: Path) -> ModelRef:
    """Find the checkpoint that a spec names, and check that it is one of the model in `source`.

    Only configs and headers are read.

    Raises:
        ModelError: No such checkpoint, it is not quantized, or of another model than W.
        CorruptArtifactError: A file is damaged.
    """
    ref = resolve(ModelSpec(path=spec.path, revision=spec.revision), "quantize.path")
    config, full = read_config(ref.path), read_config(source)
    if "quantization_config" not in config:
        remedy = "give it as model.path, and a method that quantizes it"
        raise ModelError("the model is not quantized", where=spec.path, remedy=remedy)
    gguf = gguf_file(Path(ref.path)) is not None
    for key in SAME[gguf:]:  # llama.cpp calls several architectures "llama"
        theirs, ours = config.get(key), full.get(key)
        if None not in (theirs, ours) and theirs != ours:
            raise _other(spec, f"its {key} is {theirs}, not {ours}")
    if not gguf:  # all of whose shapes follow from the config that it carries
        _check_shapes(spec, Path(ref.path), source)
    if _must_be_read(config):
        QuantizedCheckpoint.open(ref.path)
    return ref


def _must_be_read(config: Mapping[str, Any]) -> bool:
    """Return whether a model runs only if its codes can be read: no library here runs it."""
    method = dict(config["quantization_config"]).get("quant_method")
    return method not in formats.names or decoded_because(config) is not None


def _check_shapes(spec: CheckpointSpec, found: Path, source: Path) -> None:
    theirs, ours = TensorFiles(found), TensorFiles(source)
    for name in theirs:
        packed = not theirs.entries[name].dtype.is_floating_point
        if name in ours and not packed and theirs.shape(name) != ours.shape(name):
            raise _other(spec, f"its {name} is {theirs.shape(name)}, not {ours.shape(name)}")


def _other(spec: CheckpointSpec, why: str) -> ModelError:
    remedy = "give the model that was quantized as model.path"
    return ModelError(
        f"the checkpoint is of another model than W: {why}", where=spec.path, remedy=remedy
    )


def _link(file: Path, link: Path) -> None:
    try:
        os.link(file, link)
    except OSError:  # another file system, or one without links
        shutil.copyfile(file, link)


def _counts(folder: Path) -> dict[str, Any]:
    """Return what the manifest says: layers, why it cannot be patched, how it runs here."""
    counts: dict[str, Any] = {}
    if reason := decoded_because(read_config(folder)):
        counts["runs"] = reason
    try:
        return counts | {"layers": len(QuantizedCheckpoint.open(folder))}
    except ModelError as error:
        return counts | {"layers": 0, "not_patchable": str(error)}
