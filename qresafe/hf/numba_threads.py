"""The `aqlm` package's CPU kernel, made repeatable: one numba thread, float32.

Its threads add to the same outputs without a lock, so that with more than one of them sums are
lost now and then; and it takes float32 only. It serves codebooks of 256 vectors; all others are
decoded and multiplied by torch.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from typing import Any

from qresafe.errors import ResourceError


def dtype_for(config: Mapping[str, Any], device: str, dtype: Any) -> Any:
    """Return the type to load a model in: `dtype`, but float32 where the kernel will run.

    There, numba is also held to one thread for the rest of the process.

    Args:
        config: The model's config.json.
        device: Where it will run.
        dtype: What was asked for.

    Raises:
        ResourceError: numba is missing, or runs with several threads already.
    """
    scheme = config.get("quantization_config") or {}
    is_kernel = (scheme.get("quant_method"), scheme.get("nbits_per_codebook")) == ("aqlm", 8)
    if not is_kernel or device.split(":")[0] != "cpu":
        return dtype
    hold_to_one_thread()
    return "float32"


def hold_to_one_thread() -> None:
    """Let numba run one thread from here on.

    Raises:
        ResourceError: numba is missing, or runs with several threads already.
    """
    if importlib.util.find_spec("numba") is None:
        raise ResourceError("AQLM on a CPU needs numba", remedy="pip install numba")
    os.environ["NUMBA_NUM_THREADS"] = "1"  # read when numba is imported
    if "numba" not in sys.modules:
        return
    from numba.core import config

    try:
        config.reload_config()  # type: ignore[no-untyped-call]
    except RuntimeError:
        remedy = "start again with NUMBA_NUM_THREADS=1"
        raise ResourceError("numba has started several threads", remedy=remedy) from None
