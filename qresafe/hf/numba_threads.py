"""The `aqlm` package's CPU kernel, made repeatable: one numba thread, float32.

Its threads add to the same outputs without a lock, so that with more than one of them sums are
lost now and then; and it takes float32 only. It serves codebooks of 256 vectors; all others are
decoded and multiplied by torch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from qresafe.errors import ResourceError


def runs_on_numba(config: Mapping[str, Any], device: str) -> bool:
    """Say whether a model will run the kernel.

    Args:
        config: The model's config.json.
        device: Where it will run, e.g. "cpu" or "cuda:0".

    Raises:
        ResourceError: It would, and numba is missing.
    """
    scheme = config.get("quantization_config") or {}
    is_kernel = (scheme.get("quant_method"), scheme.get("nbits_per_codebook")) == ("aqlm", 8)
    if not is_kernel or device.split(":")[0] != "cpu":
        return False
    if importlib.util.find_spec("numba") is None:
        raise ResourceError("AQLM on a CPU needs numba", remedy="pip install numba")
    return True


def hold_to_one_thread(model: Any) -> Any:
    """Let every forward pass of `model` use one numba thread, and return the model.

    numba counts threads for each calling thread, so the limit is set where the model runs; that
    works whoever imported numba before, and in whatever thread the model was loaded.
    """
    model.register_forward_pre_hook(_hold)
    return model


def _hold(*_: Any) -> None:
    import numba

    numba.set_num_threads(1)
