"""Which layers bitsandbytes would quantize, and which of them its kernels can run here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from qresafe.hf.writing import meta_model

BLOCK, ROWS = 64, 32  # inputs and outputs come in such numbers to the CPU's own 4-bit kernel


def replaced_layers(folder: Path) -> dict[str, tuple[int, int]]:
    """Return layer -> (outputs, inputs) of the modules that transformers would replace."""
    from transformers.pytorch_utils import Conv1D

    modules = list(meta_model(folder).named_modules())
    across = {n: (m.weight.shape[1], m.weight.shape[0]) for n, m in modules if type(m) is Conv1D}
    linear = {n: (m.out_features, m.in_features) for n, m in modules if type(m) is nn.Linear}
    return linear | across


def skips(layer: str, entries: Sequence[str]) -> bool:
    """Return whether transformers leaves a layer alone: by prefix, pattern or ending."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    return not should_convert_module(layer, list(entries))


def packs_for_the_cpu() -> bool:
    """Return whether models run on a CPU for which bitsandbytes packs 4-bit codes anew."""
    if torch.cuda.is_available():
        return False
    from bitsandbytes import functional

    return bool(functional.has_avx512bf16())  # type: ignore[no-untyped-call]
