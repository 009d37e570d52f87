"""Quantized models that run with decoded weights here, for want of a library or a fast kernel."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What transformers needs for a format, beyond what is installed with qresafe.
LIBRARIES = {"gptq": ("gptqmodel", "optimum"), "awq": ("gptqmodel",)}


def decoded_because(config: Mapping[str, Any], device: str = "") -> str | None:
    """Return why a model with this config.json runs with decoded weights; None if as it is.

    The `aqlm` package's CPU kernels take one row at a time, or decode every layer at every step,
    and the former loses sums with more than one thread: it adds to the same outputs without a lock.

    Args:
        config: The model's.
        device: Where it is to run, e.g. "cpu"; empty: not said.
    """
    quantized = config.get("quantization_config")
    method = quantized.get("quant_method") if isinstance(quantized, Mapping) else None
    if method == "aqlm" and device == "cpu":
        return "runs with decoded weights: aqlm's kernels for a CPU are slow"
    needed = LIBRARIES.get(str(method), ())
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    verb = "is" if len(missing) == 1 else "are"
    return f"run with decoded weights: {' and '.join(missing)} {verb} not installed"


def load_decoded(folder: Path, dtype: Any, device: str, reason: str) -> Any:
    """Load a quantized model as a plain one with decoded weights, and say so once.

    Args:
        folder: A folder that `QuantizedCheckpoint.open` recognises.
        dtype: "auto" (the checkpoint's), a torch dtype or its name.
        device: As `load_model` takes it.
        reason: What to say.
    """
    import torch

    from qresafe.hf.checkpoint import load_dense
    from qresafe.hf.spread import place

    warnings.warn(f"{folder.name}: {reason}", stacklevel=2)
    wanted = None if dtype == "auto" else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return place(load_dense(folder, wanted)[0], device)
