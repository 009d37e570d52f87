"""What made a result: versions of the libraries, the machine, the project's revision."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "ray", "deepspeed", "compressed-tensors", "bitsandbytes")


@cache
def versions() -> dict[str, str]:
    """Return the versions of the packages that a result depends on, without importing them."""
    found = {"python": platform.python_version()}
    for package in ("qresafe", *PACKAGES):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def hardware() -> dict[str, Any]:
    """Return what a reader needs to judge a timing."""
    return {"machine": platform.machine(), "cpus": os.cpu_count(), "system": platform.system()}


@cache
def git_revision() -> str | None:
    """Return the project's git revision, with `+` if the tree has changes; None outside git."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(here), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
