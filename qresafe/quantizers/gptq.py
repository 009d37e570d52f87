"""GPTQ: columns rounded one by one, later ones make up for the error (arXiv 2210.17323)."""

from __future__ import annotations

from pathlib import Path

from qresafe.hf.llmcompressor import compress
from qresafe.progress import Progress, Silent
from qresafe.quantize_specs import GptqSpec
from qresafe.quantizers.base import CHECKPOINT, QuantizeResult, layers_to_quantize
from qresafe.quantizers.calibrated import integers, sequences
from qresafe.storage import local_folder


def quantize(
    model_path: str | Path,
    target: Path,
    spec: GptqSpec,
    *,
    control: bool = True,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Write `target/checkpoint` in compressed-tensors' format; see `Quantizer`.

    Memory: W, or one block of it where that is too much; each layer of a block takes 4 bytes x
    inputs^2 more.

    Raises:
        ResourceError: llm-compressor is not installed.
        ModelError: A layer does not fit the group size, or the model cannot be quantized.
        DataError: A user's calibration file is malformed.
    """
    source = local_folder(model_path)
    names = planned(source, spec)
    calibration = sequences(source, spec)
    order = None if spec.act_order == "none" else spec.act_order
    settings = {"actorder": order, "dampening_frac": spec.damp, "block_size": spec.block_size}
    shown = progress or Silent()
    shown.start("quantize", len(names), "layers")
    warnings = compress(
        target / CHECKPOINT,
        source,
        names,
        {"GPTQModifier": settings},
        weights=integers(spec.bits, spec.group_size, spec.symmetric),
        sequences=calibration,
        progress=shown,
    )
    counts = {"layers": len(names), "sequences": len(calibration), "warnings": warnings}
    return QuantizeResult(counts)


def planned(source: Path, spec: GptqSpec) -> list[str]:
    """Return what `quantize` would; see `registry.planned_layers`."""
    return layers_to_quantize(source, spec.skip, spec.group_size)
