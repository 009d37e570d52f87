"""QLoRA: LoRA fine-tuning above frozen low-bit weights (Dettmers et al. 2023, arXiv 2305.14314).

W is quantized by the base method and an adapter is trained beside it. Deployed is either that
checkpoint with the adapter, or the two merged and quantized again by the same method: merged into
the decoded weights, because those are what the adapter has learned beside. The control arm is the
same adapter trained on W itself and merged in full precision.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qresafe.errors import ModelError
from qresafe.hf.checkpoint import QuantizedCheckpoint
from qresafe.hf.finetune import Chat, total_steps
from qresafe.hf.lora import merged_weights, save_adapter, train_adapter
from qresafe.hf.models import load_model
from qresafe.hf.overlaid import decompress_on_load
from qresafe.hf.writing import write_dense, write_plain
from qresafe.progress import Progress, Silent
from qresafe.quantize_specs import BnbSpec, QloraSpec, RtnSpec
from qresafe.quantizers.base import CHECKPOINT, CONTROL, QuantizeResult, put
from qresafe.quantizers.calibrated import learned
from qresafe.registry import planned_layers, quantizers
from qresafe.storage import local_folder


def quantize(
    model_path: str | Path,
    target: Path,
    spec: QloraSpec,
    *,
    control: bool = True,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Write `target/checkpoint` in the base method's format, and `target/control`; see `Quantizer`.

    Memory: the quantized model, its activations, and 16 bytes per weight of the adapter, as in
    the paper; a base of integers is trained on decoded, so it needs W's memory. The control needs
    W in float32.

    Raises:
        ModelError: A layer does not fit the base method, or none matches `targets`.
        DataError: A user's calibration file is malformed, or a chat too long.
    """
    source = local_folder(model_path)
    layers = planned(source, spec)
    chats = learned(source, spec.calibration, spec.seed)
    steps = total_steps(spec.steps, spec.epochs, len(chats), spec.batch_size)
    target.mkdir(parents=True, exist_ok=True)
    shown = progress or Silent()
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        base = _quantized(source, Path(scratch) / "base", spec.base)
        decompress_on_load(base)
        shown.start("quantize", steps * (2 if control else 1), "steps")
        adapted, losses = _train(base, "auto", layers, chats, spec, steps, shown)
        save_adapter(adapted, base)
        del adapted
        _deploy(base, target / CHECKPOINT, spec)
    counts: dict[str, Any] = {"layers": len(layers), "chats": len(chats), "losses": losses}
    counts |= {"steps": steps, "deployed": spec.deploy}
    if not control:
        return QuantizeResult(counts)
    float32 = torch.float32
    plain, counts["control_losses"] = _train(source, float32, layers, chats, spec, steps, shown)
    write_plain(target / CONTROL, source, merged_weights(plain, layers))
    return QuantizeResult(counts, target / CONTROL)


def planned(source: Path, spec: QloraSpec) -> list[str]:
    """Return the layers that get an adapter; see `registry.planned_layers`."""
    return adapted_layers(planned_layers.get(spec.base.method)(source, spec.base), spec.targets)


def adapted_layers(quantized: Sequence[str], targets: tuple[str, ...]) -> list[str]:
    """Return the quantized layers whose last name part is among `targets`, or all.

    Raises:
        ModelError: No layer matches.
    """
    found = [name for name in quantized if not targets or name.rpartition(".")[2] in targets]
    if not found:
        ends = sorted({name.rpartition(".")[2] for name in quantized})
        remedy = f"choose among {', '.join(ends)}"
        raise ModelError(f"no layer matches {targets}", where="quantize.targets", remedy=remedy)
    return found


def _quantized(source: Path, target: Path, spec: RtnSpec | BnbSpec) -> Path:
    quantizers.get(spec.method)(source, target, spec)
    return target / CHECKPOINT


def _train(
    folder: Path,
    dtype: Any,
    layers: Sequence[str],
    chats: Sequence[Chat],
    spec: QloraSpec,
    steps: int,
    progress: Progress,
) -> tuple[Any, list[float]]:
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    model = load_model(folder, dtype=dtype, device=device)
    return train_adapter(model, layers, chats, spec, steps=steps, progress=progress)


def _deploy(adapted: Path, target: Path, spec: QloraSpec) -> None:
    made = adapted
    if spec.deploy == "merged":
        merged = adapted.parent / "merged"
        # Decoded from the files: bitsandbytes' own decoding may be wrong after a forward pass.
        write_dense(merged, QuantizedCheckpoint.open(adapted), lambda _, weight: weight)
        made = _quantized(merged, adapted.parent / "again", spec.base)
    put(made, target)
