"""What all jobs share: their options, and a storage that outlives them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from upath import UPath

from qresafe.artifacts import is_local
from qresafe.commands.options import Name, Overrides, Storage, Workers, experiment
from qresafe.presets import preset_names
from qresafe.specs import ExperimentSpec

__all__ = ["Name", "Overrides", "Preset", "Storage", "Workers", "job_experiment", "job_storage"]

Preset = Annotated[
    str,
    typer.Option("--preset", help=f"A preset ({', '.join(preset_names())}) or a YAML file."),
]


def job_experiment(
    preset: str,
    overrides: list[str] | None,
    workers: int | None,
    storage: str | None,
    name: str | None,
) -> ExperimentSpec:
    """Return the experiment of a job, with a storage outside the job's working directory."""
    spec = experiment(preset, overrides, workers=workers, storage=storage, name=name)
    return spec.model_copy(update={"storage": job_storage(spec.storage)})


def job_storage(storage: str) -> str:
    """Return a storage that outlives a job's working directory, a copy that Ray deletes.

    A relative folder is put under $QRESAFE_STORAGE (which may be a URL), or ~/qresafe; a URL stays.
    """
    if not is_local(UPath(storage)):
        return storage
    root, folder = os.environ.get("QRESAFE_STORAGE") or "~/qresafe", Path(storage).expanduser()
    if is_local(UPath(root)):
        return str(Path(root).expanduser() / folder)
    if folder.is_absolute():
        return str(folder)
    return str(UPath(root).joinpath(*folder.parts))  # Path would make "s3://" a folder "s3:"
