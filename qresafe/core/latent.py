"""Where a weight stood in its cell before it was rounded: the latent start of a patch.

From a grid point, a change of less than half a step is rounded away, and at 2 or 3 bits half a
step is much. Fine-tuning through the rounding (LLM-QAT) leaves latent weights that lie anywhere
in their cells: from there a small change can already move a code. Whatever does not change still
has its own code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qresafe.core.grids import QuantizedTensor
from qresafe.errors import ModelError


def latent_offset(quantized: QuantizedTensor, latent: Tensor, where: str = "the layer") -> Tensor:
    """Return latent - decode(codes), (out, in), float32, which alone moves no code.

    Args:
        quantized: The rounded weight.
        latent: The weight from before it was rounded, (out, in).
        where: For the message.

    Raises:
        ModelError: `latent` rounds to other codes.
    """
    grid, codes = quantized.grid, quantized.codes
    fits = tuple(latent.shape) == grid.shape
    if not fits or not torch.equal(grid.encode(latent).to(codes.dtype), codes):
        what = "latent weights that do not round to the checkpoint's codes"
        raise ModelError(what, where=where, remedy="quantize again with quantize.keep_latent=true")
    offset = latent.float() - grid.to(dtype=torch.float32).decode(codes)
    # On the border of two cells, encode and move may differ in the last bit.
    return offset.masked_fill_(grid.move(codes, offset) != codes, 0.0)
