"""Gradients through float16: those that would vanish arrive, and other types are left alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qresafe.hf.half import scale_gradients


def gradient(dtype: torch.dtype, *, scaled: bool) -> tuple[Tensor, float]:
    """Return d loss / d factor through two layers of `dtype`, for a loss of about 1e-6."""
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(8, 8, generator=generator) / 3 for _ in range(2)]
    inputs = torch.randn(4, 8, generator=generator)
    model = nn.ParameterList(layer.to(dtype) for layer in layers)
    factor = nn.Parameter(torch.zeros(8, 8))
    scale = scale_gradients(model, [factor]) if scaled else 1.0
    hidden = inputs.to(dtype) @ (model[0] + factor.to(dtype)).T
    loss = (hidden @ model[1].T).float().square().mean() * 1e-6
    (loss * scale).backward()
    assert factor.grad is not None
    return factor.grad, scale


def test_small_gradients_pass_float16() -> None:
    """float32 is the oracle: scaled they are within its rounding, 2^-11, of a few sums."""
    right, _ = gradient(torch.float32, scaled=False)
    lost, _ = gradient(torch.float16, scaled=False)
    kept, scale = gradient(torch.float16, scaled=True)
    assert scale > 1
    assert float((lost - right).norm() / right.norm()) > 0.3
    assert float((kept - right).norm() / right.norm()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types_are_left_alone(dtype: torch.dtype) -> None:
    plain, _ = gradient(dtype, scaled=False)
    found, scale = gradient(dtype, scaled=True)
    assert scale == 1.0
    assert torch.equal(plain, found)
