"""bitsandbytes' own quantizers: NF4, FP4 and LLM.int8()."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qresafe.hf.checkpoint import QuantizedCheckpoint
from qresafe.hf.writing import write_bitsandbytes
from qresafe.progress import Progress
from qresafe.quantize_specs import BnbSpec
from qresafe.quantizers.base import CHECKPOINT, QuantizeResult
from qresafe.storage import local_folder


def quantize(
    model_path: str | Path,
    target: Path,
    spec: BnbSpec,
    *,
    control: bool = True,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Write `target/checkpoint` in bitsandbytes' format; see `Quantizer`.

    Not layer by layer: transformers loads and saves the model as a whole, which takes the memory
    of W and of the quantized model.

    Raises:
        ResourceError: bitsandbytes is not installed.
        ModelError: The model cannot be loaded.
    """
    write_bitsandbytes(target / CHECKPOINT, local_folder(model_path), _options(spec))
    return QuantizeResult({"layers": len(QuantizedCheckpoint.open(target / CHECKPOINT))})


def _options(spec: BnbSpec) -> dict[str, Any]:
    skip = {"llm_int8_skip_modules": list(spec.skip)}  # of all formats, in spite of its name
    if spec.format == "int8":
        return skip | {"load_in_8bit": True}
    return skip | {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": spec.format,
        "bnb_4bit_use_double_quant": spec.double_quant,
    }
