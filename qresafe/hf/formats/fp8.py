"""FP8 checkpoints as transformers saves them: E4M3 with one scale per 128x128 block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qresafe.errors import ModelError
from qresafe.hf.formats.base import Codec
from qresafe.hf.tensor_files import TensorFiles


def codec(files: TensorFiles, config: Mapping[str, Any]) -> Codec:
    """Refuse in words: no grid here has scales by blocks of rows and columns.

    Such a model can be assessed: plain transformers loads it, and decodes it where the machine
    has no FP8 kernels.

    Raises:
        ModelError: Always.
    """
    what = "block-scaled FP8 weights can be assessed, not patched"
    remedy = "to patch, use compressed-tensors FP8 (float-quantized)"
    raise ModelError(what, where=str(files.folder), remedy=remedy)
