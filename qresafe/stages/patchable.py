"""What a quantizer's weights do not allow a patch, said before anything runs."""

from __future__ import annotations

from qresafe.errors import SpecError
from qresafe.hf.checkpoint import QuantizedCheckpoint
from qresafe.hf.models import resolve
from qresafe.quantize_specs import (
    AqlmSpec,
    BnbSpec,
    CheckpointSpec,
    Critical16Spec,
    QloraSpec,
    QuantizeSpec,
)
from qresafe.specs import ModelSpec, PatchSpec


def check_patchable(spec: PatchSpec, quantize: QuantizeSpec) -> None:
    """Find a way of patching that the quantizer does not allow.

    Raises:
        SpecError: Flips of codes that stand for several weights, a start from latent weights that
            are not kept, or training of scales that are not stored as they are.
        ModelError: The same of a checkpoint that exists already.
    """
    if spec.start == "latent" and not getattr(quantize, "keep_latent", False):
        raise no_latents()
    below = getattr(quantize, "base", None) or quantize
    if spec.method == "flips" and below.method == "aqlm":
        what = "a code of AQLM stands for several weights and has no neighbours to flip to"
        raise SpecError(what, where="patch.method", remedy="use masked_lora")
    if spec.trains != "codes":
        _check_scales(quantize)


def no_latents() -> SpecError:
    """Return the error for a start from latent weights where there are none."""
    remedy = "set quantize.method=llm_qat and quantize.keep_latent=true, or start to checkpoint"
    return SpecError("no latent weights of Q0 are kept", where="patch.start", remedy=remedy)


def _check_scales(quantize: QuantizeSpec) -> None:
    if isinstance(quantize, CheckpointSpec):
        model = ModelSpec(path=quantize.path, revision=quantize.revision)
        QuantizedCheckpoint.open(resolve(model, "quantize.path").path).require_scales()
    elif why := _no_scales(quantize):
        what = f"the scales of {why}, so that a patch cannot change them"
        raise SpecError(what, where="patch.trains", remedy="set it to codes")


def _no_scales(quantize: QuantizeSpec) -> str:
    """Return whose scales cannot be changed and why; empty: they can."""
    if isinstance(quantize, Critical16Spec) and quantize.structure == "weights":
        return "weights with others in 16 bits among them would not act on these"
    if isinstance(quantize, QloraSpec) and quantize.deploy == "adapter":
        return "weights under an adapter would not act on it"
    if isinstance(quantize, Critical16Spec | QloraSpec):
        return _no_scales(quantize.base)
    if isinstance(quantize, BnbSpec) and (quantize.double_quant or quantize.format == "int8"):
        return "double-quantized and LLM.int8() weights are not stored as they are"
    if isinstance(quantize, AqlmSpec):
        return "AQLM act on sums of codebook vectors"
    return ""
