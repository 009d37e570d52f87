"""Checkpoints of a running patch: two generations, safetensors and JSON, never half a file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor
from upath import UPath

from qresafe.artifacts import read_bytes, read_text, write_bytes, write_text
from qresafe.integrity import open_json, sealed_json, tell
from qresafe.storage import children

FOLDER = "work/checkpoints"  # `work/` is not part of the finished artefact
GENERATIONS = 2


def save(folder: UPath, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write the checkpoint of `step`, then drop all but the newest two.

    The metadata holds the tensors' hash and comes last: a checkpoint without it, or with another
    hash, was cut off and does not count. It is sealed itself.

    Args:
        folder: The stage's folder, on any storage.
        step: Optimizer steps done.
        tensors: What the run needs to continue.
        meta: JSON-able: step counter, mask version, world size, history.
    """
    place = folder / FOLDER / f"{step:08d}"
    place.mkdir(parents=True, exist_ok=True)
    data = safetensors.save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
    write_bytes(place / "state.safetensors", data)
    sealed = dict(meta) | {"step": step, "sha256": hashlib.sha256(data).hexdigest()}
    write_text(place / "meta.json", sealed_json(sealed))
    for old in _newest_first(folder)[GENERATIONS:]:
        _remove(old)


def load(folder: UPath, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return (tensors, meta) of the newest whole checkpoint, or None if there is none.

    Args:
        folder: The stage's folder.
        device: Where the tensors go.
    """
    for place in _newest_first(folder):
        found = _read(place)
        if found is not None:
            tensors, meta = found
            return {k: v.to(device) for k, v in tensors.items()}, meta
    return None


def adopt(folder: UPath, other: UPath) -> None:
    """Give `folder` the checkpoints of `other`, unless it has its own."""
    if _newest_first(folder):
        return
    for place in reversed(_newest_first(other)):
        if found := _read(place):
            tensors, meta = found
            save(folder, meta["step"], tensors, meta)


def _read(place: UPath) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return a checkpoint; None if it was cut off, or is damaged, which is told."""
    try:
        text = read_text(place / "meta.json")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        text = ""
    data = b""
    try:
        meta = open_json(text)
        data = read_bytes(place / "state.safetensors")
    except (FileNotFoundError, ValueError):
        meta = {}
    if hashlib.sha256(data).hexdigest() == meta.get("sha256"):
        return safetensors.load(data), meta
    tell(f"damaged checkpoint {place}: training goes on from the one before it")
    return None


def _newest_first(folder: UPath) -> list[UPath]:
    return children(folder / FOLDER)[::-1]


def _remove(place: UPath) -> None:
    (place / "meta.json").unlink(missing_ok=True)  # first: it is what makes a checkpoint count
    (place / "state.safetensors").unlink(missing_ok=True)
    for rest in children(place):
        rest.unlink(missing_ok=True)
    if place.exists():  # an object store has no empty folders
        place.rmdir()
