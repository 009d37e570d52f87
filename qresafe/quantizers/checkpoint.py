"""No quantizer: a quantized checkpoint that exists already takes the place of Q0.

Its files are linked (copied where the storage is another file system), so it takes no room.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from qresafe.errors import ModelError
from qresafe.hf.checkpoint import QuantizedCheckpoint
from qresafe.hf.decoded import decoded_because
from qresafe.hf.gguf_folder import gguf_file
from qresafe.hf.models import ModelRef, read_config, resolve
from qresafe.hf.tensor_files import TensorFiles
from qresafe.hf.writing import copy_sidecars
from qresafe.progress import Progress, Silent
from qresafe.quantize_specs import CheckpointSpec
from qresafe.quantizers.base import CHECKPOINT, QuantizeResult
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
        if file.is_file() and (own or file.suffix == ".gguf" or file.name == "config.json"):
            _link(file.resolve(), made / file.name)
    if not own or not any(made.glob("tokenizer*")):
        copy_sidecars(source, made)
    counts = _counts(made)
    shown.advance(note=str(counts.get("runs") or ""))
    return QuantizeResult(counts)


def find(spec: CheckpointSpec, source: Path) -> ModelRef:
    """Find the checkpoint that a spec names, and check that it is one of the model in `source`.

    Only configs and headers are read.

    Raises:
        ModelError: No such checkpoint, it is not quantized, or of another model than W.
        CorruptArtifactError: A file is damaged.
    """
    ref = resolve(ModelSpec(path=spec.path, revision=spec.revision))
    config, full = read_config(ref.path), read_config(source)
    if "quantization_config" not in config:
        remedy = "give it as model.path, and a method that quantizes it"
        raise ModelError("the model is not quantized", where=spec.path, remedy=remedy)
    for key in SAME:
        theirs, ours = config.get(key), full.get(key)
        if None not in (theirs, ours) and theirs != ours:
            raise _other(spec, f"its {key} is {theirs}, not {ours}")
    _check_shapes(spec, Path(ref.path), source)
    return ref


def _check_shapes(spec: CheckpointSpec, found: Path, source: Path) -> None:
    if gguf_file(found):  # all of its shapes follow from the config that it carries
        return
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
