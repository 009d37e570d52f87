"""GPT-2's transposed linear layers: weights (in, out), where bitsandbytes stores (out, in)."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qresafe.hf.models import load_config


@lru_cache(maxsize=16)
def conv1d_layers(folder: Path) -> frozenset[str]:
    """Return the names of a causal LM's `Conv1D` modules, without loading its weights."""
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    config = load_config(folder)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError:  # not a causal LM: said where it is loaded
        return frozenset()
    return frozenset(name for name, one in model.named_modules() if isinstance(one, Conv1D))


def straighten(model: Any, names: Collection[str]) -> None:
    """Replace those of the named layers that are `Conv1D` by `nn.Linear`, in place."""
    from transformers.pytorch_utils import Conv1D

    for name, layer in list(model.named_modules()):
        if name in names and isinstance(layer, Conv1D):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _linear(layer))


def _linear(layer: Any) -> nn.Linear:
    rows, columns = layer.weight.shape
    linear = nn.Linear(rows, columns, device="meta")
    linear.weight = nn.Parameter(layer.weight.detach().T.contiguous())
    linear.bias = layer.bias
    return linear
