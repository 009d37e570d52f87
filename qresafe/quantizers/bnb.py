"""bitsandbytes' own quantizers (NF4, FP4, LLM.int8()), through transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from qresafe.errors import ResourceError
from qresafe.hf.checkpoint import QuantizedCheckpoint, built_aside
from qresafe.hf.models import check_folder
from qresafe.hf.writing import copy_sidecars
from qresafe.progress import Progress
from qresafe.quantizers.base import CHECKPOINT, QuantizeResult
from qresafe.specs import BnbSpec
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

    The model is saved before any forward pass: on CPUs with AVX512-BF16 the first one repacks
    4-bit weights, and what is saved afterwards is silently wrong.

    Raises:
        ResourceError: bitsandbytes is not installed.
    """
    from transformers import AutoModelForCausalLM

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ResourceError("bitsandbytes is not installed", remedy="pip install bitsandbytes")
    source = local_folder(model_path)
    check_folder(source)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        quantization_config=_config(spec),
        dtype="auto",
        device_map={"": "cuda:0" if torch.cuda.is_available() else "cpu"},
        use_safetensors=True,
        local_files_only=True,
    )
    with built_aside(target / CHECKPOINT) as folder:
        model.save_pretrained(folder)
        copy_sidecars(source, folder)
    return QuantizeResult({"layers": len(QuantizedCheckpoint.open(target / CHECKPOINT))})


def _config(spec: BnbSpec) -> Any:
    from transformers import BitsAndBytesConfig

    skip = list(spec.skip)
    if spec.format == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.format,
        bnb_4bit_use_double_quant=spec.double_quant,
        llm_int8_skip_modules=skip,
    )
