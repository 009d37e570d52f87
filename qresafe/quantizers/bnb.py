"""bitsandbytes' own quantizers: NF4, FP4 and LLM.int8()."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qresafe.errors import ModelError
from qresafe.hf.bnb_layers import BLOCK, ROWS, packs_for_the_cpu, replaced_layers, skips
from qresafe.hf.bnb_writing import write_bitsandbytes
from qresafe.progress import Progress, Silent
from qresafe.quantize_specs import BnbSpec
from qresafe.quantizers.base import (
    CHECKPOINT,
    QuantizeResult,
    check_skip,
    no_layers,
    refuse_quantized,
)
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

    One tensor of W is in memory at a time; see `write_bitsandbytes` for the exception.

    Raises:
        ResourceError: bitsandbytes is not installed.
        ModelError: The model cannot be loaded, or a layer does not fit, or is not finite.
        SpecError: `skip` names what the model does not have.
    """
    source = local_folder(model_path)
    names = planned(source, spec)
    shown = progress or Silent()
    shown.start("quantize", len(names), "layers")
    write_bitsandbytes(target / CHECKPOINT, source, options(spec), shown.advance)
    return QuantizeResult({"layers": len(names)})


def options(spec: BnbSpec) -> dict[str, Any]:
    """Return a spec as the settings of transformers' `BitsAndBytesConfig`."""
    skip = {"llm_int8_skip_modules": list(spec.skip)}  # of all formats, in spite of its name
    if spec.format == "int8":
        return skip | {"load_in_8bit": True}
    return skip | {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": spec.format,
        "bnb_4bit_use_double_quant": spec.double_quant,
    }


def planned(source: Path, spec: BnbSpec) -> list[str]:
    """Return what `quantize` would; see `registry.planned_layers`."""
    refuse_quantized(source)
    shapes = replaced_layers(source)
    check_skip(spec.skip, list(shapes), skips)
    chosen = {name: shape for name, shape in shapes.items() if not skips(name, spec.skip)}
    if not chosen:
        raise no_layers(source)
    if spec.format != "int8":
        _check_shapes(chosen, str(source))
    return list(chosen)


def _check_shapes(shapes: Mapping[str, tuple[int, int]], where: str) -> None:
    """Refuse 4-bit layers whose codes do not fill bytes, or that this CPU's kernel cannot run."""
    on_cpu = packs_for_the_cpu()
    for name, (outputs, inputs) in shapes.items():
        what = ""
        if outputs * inputs % 2:
            what = f"{name} has an odd number of weights ({outputs} x {inputs})"
        elif on_cpu and (inputs % BLOCK or outputs % ROWS):
            what = (
                f"{name} is {outputs} x {inputs}, and bitsandbytes' 4-bit kernel on this CPU takes "
                f"inputs in {BLOCK}s and outputs in {ROWS}s only"
            )
        if what:
            remedy = "use format: int8, or add the layer to skip"
            raise ModelError(what, where=where, remedy=remedy)
