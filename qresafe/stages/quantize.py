"""Stage: W becomes Q0 (checkpoint/), and where the method fine-tunes, its control (control/).

latent/ holds the weights that were rounded to Q0, where the method trains such and is asked to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from upath import UPath

from qresafe.artifacts import Artifact, Run, content_key
from qresafe.embedded.calibration import calibration_chats, harmful_texts, safety_prompts
from qresafe.errors import ModelError
from qresafe.hf.checkpoint import bits_per_weight
from qresafe.hf.gguf_folder import gguf_file
from qresafe.hf.models import resolve, runs_own_code
from qresafe.hf.warm import ModelInput
from qresafe.progress import Progress, Silent
from qresafe.quantize_specs import (
    CheckpointSpec,
    Critical16Spec,
    Fp8Spec,
    LlmQatSpec,
    QuantizeSpec,
)
from qresafe.quantizers.checkpoint import find
from qresafe.registry import judges, planned_layers, quantizers
from qresafe.specs import ModelSpec
from qresafe.stages.arms import require_same
from qresafe.stages.generate import template_key
from qresafe.storage import built_locally

CODE_VERSION = 1


def quantize(
    run: Run,
    model: ModelInput,
    spec: QuantizeSpec,
    progress: Progress | None = None,
    *,
    control: bool = True,
    check: Callable[[], None] | None = None,
) -> Artifact:
    """Quantize a model into `checkpoint/`, which plain transformers loads.

    Args:
        run: Where the artefact goes.
        model: W, full precision.
        spec: The method and its settings.
        progress: Is told of layers or steps done.
        control: Also make `control/`: the same fine-tuning in full precision, where the method
            fine-tunes.
        check: Called before any work; it raises if later stages would have no room to run.

    Raises:
        UserError: What the method says of the model or its calibration data.
    """
    shown = progress or Silent()
    source = model.ref.on_this_machine()

    def work(folder: UPath) -> Mapping[str, Any]:
        if check:
            check()
        method = quantizers.get(spec.method)
        with built_locally(folder) as target:
            made = method(source.path, target, spec, control=control, progress=shown)
            sizes = _sizes(target / "checkpoint", made.counts)
        return dict(made.counts) | sizes | {"control": made.control is not None}

    artifact = run.stage(
        "quantize",
        spec=_key_spec(spec) | {"control": control},
        inputs={"model": model.key} | _calibration(spec) | _checkpoint(spec),
        code_version=CODE_VERSION,
        work=work,
    )
    shown.finish(reused=artifact.reused)
    return artifact


def check_ready(spec: QuantizeSpec, model: ModelInput) -> None:
    """Check that a method fits the model, from config and headers alone.

    A checkpoint that is made already must be of this model, and asked by the same template.

    Raises:
        SpecError: A judge is not registered, or a layer to skip does not exist.
        ModelError: The model runs code of its own; or a layer does not fit the method; or the
            checkpoint is missing, damaged, not
            quantized, or of another model than W.
        DataError: Its chat template is not W's.
    """
    if isinstance(spec, Critical16Spec):
        judges.get(spec.judge)
    folder = Path(model.ref.on_this_machine().path)
    if runs_own_code(folder):
        what = "it runs code of its own, and only models that transformers knows can be quantized"
        raise ModelError(what, where=str(folder), remedy="use a model that transformers has")
    if not isinstance(spec, CheckpointSpec):
        planned_layers.get(spec.method)(folder, spec)
        return
    found = find(spec, folder)
    own = any(Path(found.path).glob("tokenizer*")) and not gguf_file(Path(found.path))
    if own:
        templates = {"W": template_key(model), "Q0": template_key(ModelInput(found, ""))}
        require_same("chat templates", templates)


def folder_bytes(folder: Path) -> int:
    """Return the size of all files in `folder` together."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _sizes(checkpoint: Path, counts: Mapping[str, Any]) -> dict[str, float]:
    size: dict[str, float] = {"checkpoint_bytes": folder_bytes(checkpoint)}
    if "not_patchable" in counts:  # nobody here reads its codes
        return size
    bits = bits_per_weight(checkpoint, counts.get("kept_layers", ()))
    return size | {"bits_per_weight": round(bits, 4)}


def _key_spec(spec: QuantizeSpec) -> dict[str, Any]:
    """Return what of a spec decides the bits.

    What nobody asked for does not, nor does whether activations are computed twice, nor where a
    finished checkpoint lies: its content is an input.
    """
    elsewhere = {"path", "revision"} if isinstance(spec, CheckpointSpec) else set()
    return _without_unasked(spec.key_data(exclude=elsewhere | {"gradient_checkpointing"}))


def _without_unasked(data: dict[str, Any]) -> dict[str, Any]:
    nested = {k: _without_unasked(v) if isinstance(v, dict) else v for k, v in data.items()}
    unasked = [("epochs", None), ("safety", None), ("block", None)]
    return {k: v for k, v in nested.items() if (k, v) not in unasked}


def _checkpoint(spec: QuantizeSpec) -> dict[str, str]:
    """Return the content of a checkpoint made elsewhere, as a stage input."""
    if not isinstance(spec, CheckpointSpec):
        return {}
    ref = resolve(ModelSpec(path=spec.path, revision=spec.revision), "quantize.path")
    return {"checkpoint": ModelInput.of(ref).key}


def _calibration(spec: QuantizeSpec) -> dict[str, str]:
    """Return the content of what a method looks at or learns from, as stage inputs."""
    inputs: dict[str, str] = {}
    calibration = getattr(spec, "calibration", None)
    looks = not isinstance(spec, Fp8Spec) or spec.activations == "static"
    if calibration is not None and looks:
        chats = calibration_chats(calibration, getattr(spec, "seed", 0))
        inputs["calibration"] = content_key(chats)
    if isinstance(spec, LlmQatSpec) and spec.safety:
        inputs["safety prompts"] = content_key(safety_prompts(spec.safety, spec.seed))
    if isinstance(spec, Critical16Spec):
        inputs["prompts"] = content_key(harmful_texts(spec))
        inputs |= {f"base {name}": key for name, key in _calibration(spec.base).items()}
    return inputs
