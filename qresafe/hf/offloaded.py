"""W that may be larger than memory: then its weights stay on disk until they are used.

compressed-tensors' offloading does the reading. The results are the same to the byte.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qresafe.hf.models import load_model
from qresafe.hf.tensor_files import TensorFiles
from qresafe.memory import free_memory

SHARE = 2  # W may take one half of the free memory: activations and the quantized copy need some


@contextmanager
def within_memory(
    folder: Path, scratch: Path, *, dtype: torch.dtype | None = None, device: str = "cpu"
) -> Iterator[Any]:
    """Give W as `load_model` does, or without its weights in memory where they are too many.

    Args:
        folder: The full-precision model.
        scratch: An existing folder for weights that are changed on disk, up to W's size.
        dtype: Of the weights; None for the model's own.
        device: Where the model runs; weights on disk come here when they are used.

    Raises:
        ModelError: The model cannot be loaded.
    """
    wanted = dtype or "auto"
    if weight_bytes(folder, dtype) * SHARE <= min(free_memory(), _room_on(device)):
        yield load_model(folder, dtype=wanted, device=device)
        return
    from compressed_tensors.offload import from_accelerate, set_onload_device
    from compressed_tensors.offload.module import remove_module_offload
    from compressed_tensors.utils import patch_attr

    noisy = getLogger("accelerate.big_modeling")  # says that weights are on disk, as was asked
    with tempfile.TemporaryDirectory(dir=scratch) as changed:
        with patch_attr(noisy, "disabled", True):
            model = load_model(folder, dtype=wanted, device="disk", scratch=Path(changed))
        from_accelerate(model)
        set_onload_device(model, torch.device(device))
        for module in model.modules():
            # Norms are small, and llm-compressor's AWQ changes Gemma's in a way that would be lost.
            if module._parameters and not isinstance(module, (nn.Linear, nn.Embedding)):
                remove_module_offload(module, onload_tensors=True)
        yield model


def _room_on(device: str) -> float:
    """Return the bytes that a GPU has free; a CPU has what the machine has."""
    if not device.startswith("cuda"):
        return math.inf
    return float(torch.cuda.mem_get_info(torch.device(device))[0])


def weight_bytes(folder: Path, dtype: torch.dtype | None = None) -> int:
    """Return how many bytes a model's weights take, in a type or as they are stored."""
    return sum(
        math.prod(entry.shape) * (dtype or entry.dtype).itemsize
        for entry in TensorFiles(folder).entries.values()
    )


@contextmanager
def in_memory(block: nn.Module) -> Iterator[None]:
    """Hold a part of W in memory; if its weights lie on disk, they are given up for good after."""
    from compressed_tensors.offload.cache import OffloadCache
    from compressed_tensors.offload.module import remove_module_offload

    on_disk = [m for m in block.modules() if isinstance(m._parameters, OffloadCache)]
    for module in on_disk:
        remove_module_offload(module, onload_tensors=True)
    block.requires_grad_(False)
    yield
    if on_disk:
        block.to("meta")
