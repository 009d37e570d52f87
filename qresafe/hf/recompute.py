"""Gradient checkpointing: a block keeps its input only, and is computed again for its gradient.

Griewank and Walther 2000, as torch.utils.checkpoint does it. The second pass has the first one's
bits, and so has the gradient. transformers' own switch acts in training mode alone, which would
start dropout where a patch is trained.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qresafe.hf.block_calls import decoder_blocks


def recompute_blocks(model: nn.Module, *, random: bool = False) -> None:
    """Have every decoder block drop its activations in passes that ask for a gradient.

    Args:
        model: Changed in place. Passes must not fill a cache, which would grow twice.
        random: Whether a pass may draw random numbers (dropout): the second then draws the same.

    Raises:
        ModelError: The model has no list of blocks.
    """
    for block in decoder_blocks(model).values():
        block.forward = partial(_forgetting, block.forward, random)


def _forgetting(forward: Any, random: bool, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=random, **kwargs)
