"""A model over all GPUs of one process: whole blocks on each, one after the other.

transformers and accelerate do the placing. Every layer runs the kernels that it would run on one
GPU, on the same inputs, so results are the same; while one GPU computes the others wait.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qresafe.errors import ResourceError

GPU = "cuda"


def gpus(count: int) -> str:
    """Return the device of a process that has `count` GPUs, as `load_model` takes it."""
    if count < 2:
        return GPU if count else "cpu"
    return ",".join(f"{GPU}:{number}" for number in range(count))


def is_spread(device: str) -> bool:
    """Return whether a device is several GPUs."""
    return "," in device


def placing(device: str) -> dict[str, Any]:
    """Return what `from_pretrained` takes to load a model there."""
    if device == "cpu":
        return {}
    if is_spread(device):
        return {"device_map": "balanced", "max_memory": _room(device)}
    return {"device_map": {"": device}}


def place(model: Any, device: str) -> Any:
    """Put a model that is in host memory there, and return it.

    Raises:
        ResourceError: Its weights do not fit.
    """
    return spread(model, _room(device)) if is_spread(device) else model.to(device)


def spread(model: Any, room: Mapping[int | str, int]) -> Any:
    """Dispatch a transformers model over devices; see `blocks_on`."""
    from accelerate import dispatch_model

    found = blocks_on(model, room)
    return dispatch_model(model, found, skip_keys=list(model._skip_keys_device_placement or ()))


def blocks_on(model: Any, room: Mapping[int | str, int]) -> dict[str, int | str]:
    """Return module name -> device: about as many bytes on each, and no block cut in two.

    Args:
        model: A transformers model, possibly without its weights (on the meta device).
        room: Device -> bytes that are free there.

    Raises:
        ResourceError: The weights do not fit.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = list(model._no_split_modules or ())
    balanced = get_balanced_memory(model, dict(room), no_split_module_classes=whole)
    found = infer_auto_device_map(model, balanced, no_split_module_classes=whole)
    require_inside(found, model.config.model_type)
    return dict(found)


def require_inside(placed: Mapping[str, Any], where: str) -> None:
    """Refuse a placement that has gone on to the CPU or the disk, where it would crawl.

    Raises:
        ResourceError: A module is there.
    """
    outside = [name for name, device in placed.items() if device in ("cpu", "disk")]
    if outside:
        what = f"the weights do not fit on the GPUs of a worker ({outside[0]} is left over)"
        remedy = "raise resources.gpus_per_worker; `qresafe plan` says what fits"
        raise ResourceError(what, where=where, remedy=remedy)


def _room(device: str) -> dict[int | str, int]:
    """Return the free bytes of each GPU, by its number."""
    import torch

    numbers = [torch.device(name).index for name in device.split(",")]
    return {number: torch.cuda.mem_get_info(number)[0] for number in numbers}
