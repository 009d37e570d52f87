"""AWQ: inputs that matter get larger weights before rounding to nearest (arXiv 2306.00978).

The scales are folded into the layer before (a norm, or another linear layer), so the checkpoint
is an ordinary one; that layer differs from W's, and the product of both does not.
"""

from __future__ import annotations

from pathlib import Path

from qresafe.hf.llmcompressor import compress
from qresafe.progress import Progress, Silent
from qresafe.quantize_specs import AwqSpec
from qresafe.quantizers.base import CHECKPOINT, QuantizeResult, layers_to_quantize
from qresafe.quantizers.calibrated import integers, sequences
from qresafe.storage import local_folder


def quantize(
    model_path: str | Path,
    target: Path,
    spec: AwqSpec,
    *,
    control: bool = True,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Write `target/checkpoint` in compressed-tensors' format; see `Quantizer`.

    Memory: W, or one block of it where that is too much, and its inputs for all sequences.

    Raises:
        ResourceError: llm-compressor is not installed.
        ModelError: A layer does not fit the group size, or llm-compressor does not know which
            layers of this architecture can take each other's scales.
        DataError: A user's calibration file is malformed.
    """
    source = local_folder(model_path)
    names = planned(source, spec)
    calibration = sequences(source, spec)
    shown = progress or Silent()
    shown.start("quantize", len(names), "layers")
    warnings = compress(
        target / CHECKPOINT,
        source,
        names,
        {
            "AWQModifier": {"duo_scaling": spec.duo_scaling, "n_grid": spec.grid_points},
            "QuantizationModifier": {},
        },
        weights=integers(spec.bits, spec.group_size, spec.symmetric),
        sequences=calibration,
        progress=shown,
    )
    counts = {"layers": len(names), "sequences": len(calibration), "warnings": warnings}
    return QuantizeResult(counts)


def planned(source: Path, spec: AwqSpec) -> list[str]:
    """Return what `quantize` would; see `registry.planned_layers`."""
    return layers_to_quantize(source, spec.skip, spec.group_size)
