"""FP8: weights, and inputs if wanted, as E4M3 floats with a scale (arXiv 2209.05433)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qresafe.hf.llmcompressor import compress
from qresafe.progress import Progress, Silent
from qresafe.quantize_specs import Fp8Spec
from qresafe.quantizers.base import CHECKPOINT, QuantizeResult, layers_to_quantize
from qresafe.quantizers.calibrated import sequences
from qresafe.storage import local_folder

FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}


def quantize(
    model_path: str | Path,
    target: Path,
    spec: Fp8Spec,
    *,
    control: bool = True,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Write `target/checkpoint` in compressed-tensors' format; see `Quantizer`.

    Only static activations look at data. Memory: W, or one block of it where that is too much.

    Raises:
        ResourceError: llm-compressor is not installed.
        ModelError: No layer is left, or the model cannot be quantized.
        DataError: A user's calibration file is malformed.
    """
    source = local_folder(model_path)
    names = planned(source, spec)
    calibration = sequences(source, spec) if spec.activations == "static" else []
    shown = progress or Silent()
    shown.start("quantize", len(names), "layers")
    warnings = compress(
        target / CHECKPOINT,
        source,
        names,
        {"QuantizationModifier": {}},
        weights=FLOAT8 | {"strategy": spec.scales},
        inputs=_activations(spec.activations),
        sequences=calibration,
        progress=shown,
    )
    counts = {"layers": len(names), "sequences": len(calibration), "warnings": warnings}
    return QuantizeResult(counts)


def planned(source: Path, spec: Fp8Spec) -> list[str]:
    """Return what `quantize` would; see `registry.planned_layers`."""
    return layers_to_quantize(source, spec.skip, -1)


def _activations(kind: str) -> dict[str, Any] | None:
    if kind == "none":
        return None
    dynamic = kind == "dynamic"
    return FLOAT8 | {"strategy": "token" if dynamic else "tensor", "dynamic": dynamic}
