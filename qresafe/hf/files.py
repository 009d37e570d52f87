"""What a model folder may hold: files of its own, and no way out of it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from pathlib import Path

from qresafe.errors import ModelError

FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")  # no separators


def check_files(folder: Path, weights: tuple[str, ...], read: tuple[str, ...]) -> None:
    """Refuse links out of a model folder, and what only looks like a file.

    What lies beside the weights is copied into checkpoints that are made of this one: a link to
    somebody's key would travel with it. Weights may be linked: nothing else reads as weights.
    The hub's own cache is made of links from `snapshots` to `blobs`.

    Args:
        folder: The model folder.
        weights: Endings of files that may be links.
        read: Endings of files that are read, whatever they are.

    Raises:
        ModelError: A file leads out of the folder, to nothing, or to a pipe or device.
    """
    root = folder.resolve()
    inside = [root]
    if root.parent.name == "snapshots":
        inside.append(root.parent.parent / "blobs")
    for file in folder.iterdir():
        target = file.resolve()
        if not target.exists():
            raise _refused(f"{file.name} is a link to nothing", folder)
        own = any(target.is_relative_to(place) for place in inside)
        if file.is_symlink() and not own and file.suffix not in weights:
            raise _refused(f"{file.name} is a link out of the model's folder", folder)
        if file.suffix in read and not (target.is_file() or target.is_dir()):
            raise _refused(f"{file.name} is a pipe or a device", folder)


def check_names(names: Iterable[object], folder: Path) -> list[str]:
    """Return the names of shards that an index gives, sorted, each once.

    Raises:
        ModelError: One is no plain file name: transformers would follow it out of the folder.
    """
    found = {name for name in names if isinstance(name, str) and FILE_NAME.fullmatch(name)}
    odd = [name for name in names if not isinstance(name, str) or name not in found]
    if odd:
        what = f"model.safetensors.index.json names the file {str(odd[0])[:80]!r}"
        raise _refused(what, folder)
    return sorted(found)


def warn_of_code(folder: Path, key: str) -> None:
    """Say what it means that a model's own Python code is trusted.

    Args:
        folder: The model folder.
        key: The spec's key of the model.
    """
    own = ", ".join(sorted(file.name for file in folder.glob("*.py"))) or "none in the folder"
    warnings.warn(
        f"trust_remote_code is on for {key}: Python code that comes with {folder} ({own}), or that "
        "its config.json names on the hub, runs in this process and in every worker, with all that "
        "you may read, write and send. Read it first.",
        stacklevel=2,
    )


def _refused(what: str, folder: Path) -> ModelError:
    remedy = "put the file itself there, if you trust where the model comes from"
    return ModelError(what, where=str(folder), remedy=remedy)
