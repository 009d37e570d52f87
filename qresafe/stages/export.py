"""Stage: the trained patch becomes Q on Q0's own grid, in Q0's own files.

checkpoint/   Q0's files with the changed codes, and scales, in place: same format, same size
patch.qpatch  what changed alone
unrounded/    Q0 decoded plus the unrounded change, an ordinary full-precision model: what the
              patch would do without a grid
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from upath import UPath

from qresafe.artifacts import Artifact, Run
from qresafe.hf.checkpoint import QuantizedCheckpoint
from qresafe.hf.tensor_files import TensorFiles
from qresafe.hf.writing import write_dense
from qresafe.progress import Progress, Silent
from qresafe.stages import qpatch
from qresafe.stages.quantize import folder_bytes
from qresafe.storage import built_locally, local_folder

CODE_VERSION = 1


def export(
    run: Run,
    quantized: Artifact,
    patched: Artifact,
    progress: Progress | None = None,
    *,
    unrounded: bool = True,
) -> Artifact:
    """Write Q's checkpoint, its patch file and, if asked for, the unrounded adapter's model.

    Args:
        run: Where the artefact goes.
        quantized: From the quantize stage; `checkpoint/` is Q0.
        patched: From the patch stage: codes.safetensors, delta.safetensors, and
            scales.safetensors where scales were trained.
        progress: Is told of each of the three parts.
        unrounded: Also write `unrounded/`.

    Raises:
        ModelError: The patch's layers, shapes or codes do not fit Q0.
        CorruptArtifactError: A file of an input is damaged.
    """
    shown = progress or Silent()

    def work(folder: UPath) -> Mapping[str, Any]:
        shown.start("export", 3 if unrounded else 2, "parts")
        base = QuantizedCheckpoint.open(quantized.path / "checkpoint")
        with built_locally(folder) as target:
            return _export(base, local_folder(patched.path), target, patched.key, unrounded, shown)

    artifact = run.stage(
        "export",
        spec={"unrounded": unrounded},
        inputs={"quantized": quantized.key, "patch": patched.key},
        code_version=CODE_VERSION,
        work=work,
    )
    shown.finish(reused=artifact.reused)
    return artifact


def _export(
    base: QuantizedCheckpoint,
    patch: Path,
    target: Path,
    key: str,
    unrounded: bool,
    progress: Progress,
) -> dict[str, Any]:
    codes = TensorFiles(patch, [patch / "codes.safetensors"])
    trained = (patch / "scales.safetensors").is_file()
    scales = TensorFiles(patch, [patch / "scales.safetensors"]) if trained else None
    checkpoint = base.rewrite(target / "checkpoint", codes, scales=scales)
    progress.advance(note="checkpoint")
    counts = qpatch.create(base.folder, checkpoint, target / "patch.qpatch", key)
    progress.advance(note="patch file")
    if unrounded:
        deltas = TensorFiles(patch, [patch / "delta.safetensors"])

        def adjust(layer: str, weight: Tensor) -> Tensor:
            return weight + deltas[layer] if layer in deltas else weight

        write_dense(target / "unrounded", base, adjust)
        progress.advance(note="unrounded adapter")
    sizes = {"checkpoint_bytes": folder_bytes(checkpoint), "q0_bytes": folder_bytes(base.folder)}
    return counts | sizes
