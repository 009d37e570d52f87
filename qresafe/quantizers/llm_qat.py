"""LLM-QAT: fine-tuning through rounded weights (Liu et al. 2023, arXiv 2305.17888).

Latent float weights are trained while every forward pass sees them rounded to a grid that is
fitted to them anew each step; gradients pass the rounding unchanged. The control arm is the same
fine-tuning without any rounding: it tells how much of a loss the fine-tuning alone explains.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qresafe.core.grids import QuantizedTensor, UniformGrid, fit_uniform, straight_through
from qresafe.embedded.calibration import safety_prompts
from qresafe.errors import ModelError
from qresafe.hf.finetune import Chat, finetune, total_steps
from qresafe.hf.models import load_model
from qresafe.hf.recompute import recompute_blocks
from qresafe.hf.tensor_files import TensorFiles
from qresafe.hf.writing import Scheme, write_latents, write_plain, write_quantized
from qresafe.progress import Progress, Silent
from qresafe.quantize_specs import LlmQatSpec
from qresafe.quantizers.base import (
    CHECKPOINT,
    CONTROL,
    LATENT,
    QuantizeResult,
    layers_to_quantize,
)
from qresafe.quantizers.calibrated import learned
from qresafe.quantizers.safety_terms import SafetyTerms, safety_terms
from qresafe.registry import judges
from qresafe.storage import local_folder

KEYS_AND_VALUES = ("k_proj", "v_proj")


def quantize(
    model_path: str | Path,
    target: Path,
    spec: LlmQatSpec,
    *,
    control: bool = True,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Write `target/checkpoint` (compressed-tensors) and `target/control`; see `Quantizer`.

    With `spec.keep_latent` also `target/latent`: layer -> the float32 weight that rounds to its
    codes.

    Trains in float32 with AdamW: 16 bytes per weight of memory (10 with `optimizer: adamw8bit`),
    4 more for rounded weights unless `gradient_checkpointing` forms them block by block, plus the
    teacher for self-distillation. Only the quantized layers are trained, in both arms. With
    `spec.safety` the control comes without the safety terms, and is trained in any case: they need
    its answers.

    Raises:
        ModelError: A layer does not fit the group size or the key/value rounding.
        DataError: A user's calibration file is malformed, a chat is too long, or the safety terms
            find no rows.
    """
    source = local_folder(model_path)
    names = planned(source, spec)
    chats = learned(source, spec.calibration, spec.seed)
    steps = total_steps(spec.steps, spec.epochs, len(chats), spec.batch_size)
    spec = spec.model_copy(update={"steps": steps})
    train_control = control or spec.safety is not None
    shown = progress or Silent()
    shown.start("quantize", steps * (2 if train_control else 1), "steps")
    scheme = Scheme(spec.bits, spec.group_size, spec.symmetric, spec.activation_bits, spec.kv_bits)
    counts: dict[str, Any] = {"layers": len(names), "chats": len(chats)}
    if train_control:
        weights, counts["control_losses"] = _train(source, names, chats, spec, None, shown)
        replaced = {f"{name}.weight": weight for name, weight in weights.items()}
        write_plain(target / CONTROL, source, replaced)
    terms = safety_terms(source, target / CONTROL, spec.safety, spec.seed) if spec.safety else None
    rounded, counts["losses"] = _train(source, names, chats, spec, scheme, shown, terms)
    write_quantized(target / CHECKPOINT, source, _final(rounded, source, scheme), scheme)
    if spec.keep_latent:
        write_latents(target / LATENT, rounded)
    if terms:
        counts["safety"] = terms.counts()
    if train_control and not control:
        shutil.rmtree(target / CONTROL)
    return QuantizeResult(counts, target / CONTROL if control else None)


def planned(source: Path, spec: LlmQatSpec) -> list[str]:
    """Return what `quantize` would; see `registry.planned_layers`."""
    names = layers_to_quantize(source, spec.skip, spec.group_size)
    if spec.kv_bits < 16 and not any(name.endswith(KEYS_AND_VALUES) for name in names):
        remedy = "set quantize.kv_bits to 16"
        raise ModelError("the model has no separate k_proj and v_proj layers", remedy=remedy)
    if spec.safety:
        judges.get(spec.safety.judge)
        safety_prompts(spec.safety, spec.seed)
    return names


class FittedRounding(nn.Module):  # type: ignore[misc]
    """Rounds a weight to the min-max grid of its own present value, straight-through."""

    def __init__(self, scheme: Scheme, stored: torch.dtype) -> None:
        super().__init__()
        self.scheme, self.stored = scheme, stored

    def forward(self, weight: Tensor) -> Tensor:
        return straight_through(weight, fit(weight, self.scheme, self.stored))


def fit(weight: Tensor, scheme: Scheme, stored: torch.dtype) -> UniformGrid:
    """Return the grid that a checkpoint with scales of type `stored` would hold for `weight`."""
    weight = weight.detach().to(stored)
    return fit_uniform(weight, scheme.bits, scheme.group_size, scheme.symmetric)


def _train(
    source: Path,
    names: Sequence[str],
    chats: Sequence[Chat],
    spec: LlmQatSpec,
    scheme: Scheme | None,
    progress: Progress,
    terms: SafetyTerms | None = None,
) -> tuple[dict[str, Tensor], list[float]]:
    """Fine-tune with (`scheme`) or without (None) rounding: latent weights by layer, losses."""
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    model = load_model(source, dtype=torch.float32, device=device).requires_grad_(False)
    teacher = None
    if spec.loss == "self_distill":
        teacher = load_model(source, dtype=torch.float32, device=device).requires_grad_(False)
    layers = {name: model.get_submodule(name) for name in names}
    latents = {name: layer.weight.requires_grad_() for name, layer in layers.items()}
    if scheme is not None:
        _add_rounding(layers, scheme, TensorFiles(source))
    if spec.gradient_checkpointing:
        recompute_blocks(model, random=True)
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)  # for models with dropout
        losses = finetune(
            model,
            chats,
            parameters=latents.values(),
            steps=spec.steps,
            batch_size=spec.batch_size,
            lr=spec.lr,
            loss=spec.loss,
            teacher=teacher,
            extra=terms.loss if terms else None,
            optimizer=spec.optimizer,
            weight_decay=spec.weight_decay,
            adam_eps=spec.adam_eps,
            seed=spec.seed,
            progress=progress,
        )
    return {name: latent.detach().cpu() for name, latent in latents.items()}, losses


def _final(latents: dict[str, Tensor], source: Path, scheme: Scheme) -> dict[str, QuantizedTensor]:
    files = TensorFiles(source)
    final = {}
    for name, latent in latents.items():
        grid = fit(latent, scheme, files.entries[f"{name}.weight"].dtype)
        final[name] = QuantizedTensor(grid, grid.encode(latent))
    return final


def _add_rounding(layers: dict[str, Any], scheme: Scheme, files: TensorFiles) -> None:
    for name, layer in layers.items():
        stored = files.entries[f"{name}.weight"].dtype
        parametrize.register_parametrization(layer, "weight", FittedRounding(scheme, stored))
        if scheme.activation_bits < 16:
            layer.register_forward_pre_hook(
                lambda _, inputs: (round_tokens(inputs[0], scheme.activation_bits), *inputs[1:])
            )
    if scheme.kv_bits < 16:
        _round_keys_and_values(layers, scheme.kv_bits)


def _round_keys_and_values(layers: dict[str, Any], bits: int) -> None:
    for layer in (layer for name, layer in layers.items() if name.endswith(KEYS_AND_VALUES)):
        layer.register_forward_hook(lambda _, __, output: round_tokens(output, bits))


def round_tokens(activations: Tensor, bits: int) -> Tensor:
    """Round each token's vector (last dimension) to its own symmetric min-max grid.

    Equal to compressed-tensors' dynamic per-token quantization; gradients pass unchanged.

    Args:
        activations: (..., features).
        bits: 2 to 8.
    """
    rows = activations.reshape(-1, activations.shape[-1])
    grid = fit_uniform(rows.detach(), bits, -1, symmetric=True)
    return straight_through(rows, grid).reshape(activations.shape)
