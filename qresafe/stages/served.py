"""What vLLM cannot run, told from specs and configs before any model is loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qresafe.errors import ModelError, ResourceError
from qresafe.hf.gguf_folder import gguf_file
from qresafe.hf.models import beside_the_codes, read_config, resolve
from qresafe.quantize_specs import CheckpointSpec, Critical16Spec, QloraSpec, QuantizeSpec
from qresafe.specs import ExperimentSpec, ModelSpec, ResourcesSpec

WIDTHS = (4, 8)  # of compressed-tensors' packed integers
PACKED = "pack-quantized"
REMEDY = "set evaluate.generate.engine: transformers"


def check_engine(spec: ExperimentSpec, teacher: str) -> None:
    """Check that the engine of an experiment can run its models here.

    Args:
        spec: The experiment.
        teacher: W's folder.

    Raises:
        ModelError: vLLM would misread Q0 or W, or leave a part of it out.
        ResourceError: There is no vLLM, or no worker with a GPU for it.
    """
    if spec.evaluate.generate.engine != "vllm":
        return
    reasons = (_not_a_folder(Path(teacher), "model.path"), _not_served(spec.quantize))
    if reason := next(filter(None, reasons), ""):
        raise ModelError(f"engine 'vllm' cannot run this model: {reason}", remedy=REMEDY)
    check_vllm(spec.resources)


def check_vllm(resources: ResourcesSpec) -> None:
    """Check that vLLM is installed and that every worker gets a GPU.

    Raises:
        ResourceError: One of them is missing.
    """
    if not resources.workers or resources.gpus_per_worker < 1:
        remedy = "set resources.workers and .gpus_per_worker, or use engine transformers"
        raise ResourceError("engine 'vllm' needs a GPU for each worker", remedy=remedy)
    if importlib.util.find_spec("vllm") is None:
        remedy = "pip install vllm on every node, or use engine transformers"
        raise ResourceError("vllm is not installed", where="this environment", remedy=remedy)


def _not_served(spec: QuantizeSpec) -> str:
    """Return why vLLM cannot run what a method writes; empty if it can."""
    if isinstance(spec, CheckpointSpec):
        ref = resolve(ModelSpec(path=spec.path, revision=spec.revision), "quantize.path")
        extra = beside_the_codes(ref.path)
        left_out = f"it would leave out {extra} of quantize.path" if extra else ""
        gguf = _not_a_folder(Path(ref.path), "quantize.path")
        return gguf or left_out or _odd_width(_packed_widths(Path(ref.path)))
    if isinstance(spec, Critical16Spec):
        kept = f"it would leave out the 16-bit weights of structure: {spec.structure}"
        return _not_served(spec.base) if spec.structure == "layers" else kept
    if isinstance(spec, QloraSpec):
        adapter = "it would leave out the adapter of deploy: adapter"
        return adapter if spec.deploy == "adapter" else _not_served(spec.base)
    return _odd_width([getattr(spec, "bits", None)])


def _odd_width(widths: Iterable[Any]) -> str:
    odd = next((bits for bits in widths if bits is not None and bits not in WIDTHS), None)
    return "" if odd is None else f"it runs integers of 4 and 8 bits, not {odd}"


def _packed_widths(folder: Path) -> list[Any]:
    """Return the bits of compressed-tensors' packed integers in a checkpoint, by its config."""
    config = _mapping(read_config(folder).get("quantization_config"))
    groups = [_mapping(group) for group in _mapping(config.get("config_groups")).values()]
    packed = [g for g in groups if PACKED in (g.get("format"), config.get("format"))]
    return [_mapping(group.get("weights")).get("num_bits") for group in packed]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _not_a_folder(path: Path, key: str) -> str:
    is_gguf = gguf_file(path) is not None
    return f"{key} is a .gguf file, and it is given folders of safetensors" if is_gguf else ""
