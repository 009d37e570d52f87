"""What vLLM cannot run, told from specs and configs before any model is loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from qresafe.errors import ModelError, ResourceError
from qresafe.hf.gguf_folder import gguf_file
from qresafe.hf.models import beside_the_codes, resolve
from qresafe.quantize_specs import CheckpointSpec, Critical16Spec, QloraSpec, QuantizeSpec
from qresafe.specs import ExperimentSpec, ModelSpec, ResourcesSpec

WIDTHS = (4, 8)  # of compressed-tensors' packed integers
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
        return _not_a_folder(Path(ref.path), "quantize.path") or left_out
    if isinstance(spec, Critical16Spec):
        single = "it would leave out the single 16-bit weights of structure: weights"
        return single if spec.structure == "weights" else _not_served(spec.base)
    if isinstance(spec, QloraSpec):
        adapter = "it would leave out the adapter of deploy: adapter"
        return adapter if spec.deploy == "adapter" else _not_served(spec.base)
    bits = getattr(spec, "bits", None)
    if bits is not None and bits not in WIDTHS:
        return f"it runs integers of 4 and 8 bits, not {bits}"
    return ""


def _not_a_folder(path: Path, key: str) -> str:
    is_gguf = gguf_file(path) is not None
    return f"{key} is a .gguf file, and it is given folders of safetensors" if is_gguf else ""
