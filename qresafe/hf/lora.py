"""LoRA adapters by PEFT: put into a model, trained by the plain loop, stored, merged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qresafe.hf.finetune import Chat, finetune
from qresafe.hf.models import ADAPTER_CONFIG
from qresafe.hf.overlaid import ADAPTER
from qresafe.progress import Progress
from qresafe.quantize_specs import QloraSpec


def train_adapter(
    model: Any,
    layers: Sequence[str],
    chats: Sequence[Chat],
    spec: QloraSpec,
    *,
    steps: int,
    progress: Progress,
) -> tuple[Any, list[float]]:
    """Put a LoRA adapter on some layers of a frozen model and train it.

    Args:
        model: In full precision, or as bitsandbytes or compressed-tensors deploy it.
        layers: Module names to adapt.
        chats: To learn from.
        spec: rank, alpha, dropout, rate, batch size and seed.
        steps: Optimizer steps.
        progress: Advances by steps.

    Returns:
        The PEFT model around `model`, and the loss of each step.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=list(layers),
        task_type="CAUSAL_LM",
    )
    model.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)  # of A's start values and of dropout
        adapted = get_peft_model(model, config)
        losses = finetune(
            model,  # PEFT has put the adapter into it; its wrapper hides what forward() takes
            chats,
            parameters=[p for p in model.parameters() if p.requires_grad],
            steps=steps,
            batch_size=spec.batch_size,
            lr=spec.lr,
            weight_decay=spec.weight_decay,
            adam_eps=spec.adam_eps,
            max_grad_norm=spec.max_grad_norm,
            seed=spec.seed,
            progress=progress,
        )
    return adapted, losses


def save_adapter(adapted: Any, folder: Path) -> None:
    """Write PEFT's two files into a checkpoint's folder, the same bytes every time.

    PEFT's own `save_pretrained` writes sets in the order of the process, and the model's path.
    """
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(adapted)
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(tensors, str(folder / ADAPTER), metadata={"format": "pt"})
    config = adapted.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": None, "inference_mode": True}
    text = json.dumps(config, indent=2, sort_keys=True, default=_plain)
    (folder / ADAPTER_CONFIG).write_text(text)


def merged_weights(adapted: Any, layers: Sequence[str]) -> dict[str, Tensor]:
    """Return the weights of a full-precision model with its adapter added, by tensor name."""
    merged = adapted.merge_and_unload()
    return {f"{name}.weight": merged.get_submodule(name).weight.detach().cpu() for name in layers}


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)
