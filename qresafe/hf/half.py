"""Training through a float16 model: gradients on their way must not become 0."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

# A power of two, so that nothing is rounded. float16 ends at 65504: gradients of up to 16 pass.
SCALE = 4096.0


def scale_gradients(model: Any, trained: Iterable[nn.Parameter]) -> float:
    """Return what to multiply losses by, having let `trained` divide their gradients by it.

    A loss is a mean over thousands of tokens, and float16 holds nothing below 6e-8: most gradients
    would be 0 before they reach a parameter. Other types have the exponents, and are left alone.

    Args:
        model: What the gradients go through.
        trained: Its trainable parameters, float32.
    """
    if next(model.parameters()).dtype != torch.float16:
        return 1.0
    for parameter in trained:
        parameter.register_hook(lambda gradient: gradient / SCALE)
    return SCALE
