"""The finished arms of a run's folder, found without the spec that made them."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from pydantic import ValidationError
from upath import UPath

from qresafe.artifacts import Artifact, read_manifest
from qresafe.errors import DataError, nearest
from qresafe.specs import ExperimentSpec
from qresafe.stages.compare import Arms


def finished_arms(
    root: UPath, labels: tuple[str, ...] = (), spec: ExperimentSpec | None = None
) -> Arms | None:
    """Return the named arms of the newest finished comparison that has them all.

    Args:
        root: A run's folder, <storage>/runs/<name>.
        labels: Names of arms; none: all that it has.
        spec: Of the experiment that is meant, wherever it ran; None: whichever.

    Returns:
        Label -> (its `generate` stage, its `judge` stage); None where nothing was compared yet.

    Raises:
        DataError: There is no such folder, or no comparison has these arms, or none is reported
            of an experiment like this.
        CorruptArtifactError: A finished stage is not as its manifest says.
    """
    if not any((root / stage).is_dir() for stage in ("compare", "generate", "quantize")):
        remedy = "give a run's folder (<storage>/runs/<name>), or an experiment and --storage"
        raise DataError("no such run", where=str(root), remedy=remedy)
    done = [mark.parent for mark in (root / "compare").glob("*/DONE")]
    newest = sorted(done, key=lambda folder: (folder / "DONE").stat().st_mtime, reverse=True)
    if spec is not None and newest:
        reported = _reported(root, spec)
        newest = [folder for folder in newest if folder.name in reported]
        if not newest:
            remedy = "run the experiment with these settings, or give the run's folder instead"
            raise DataError("its reports are of other settings", where=str(root), remedy=remedy)
    known: set[str] = set()
    for folder in newest:
        manifest = read_manifest(folder)
        arms = manifest.spec["arms"]
        known |= set(arms)
        if set(labels) <= set(arms):
            return {label: _arm(root, manifest.inputs, label) for label in labels or arms}
    if not newest:
        return None
    missing = next((label for label in labels if label not in known), labels[0])
    raise DataError(f"no arm {missing!r}", where=str(root), remedy=nearest(missing, known))


def _reported(root: UPath, spec: ExperimentSpec) -> set[str]:
    """Return the keys of the comparisons that were reported of an experiment like this."""
    found = set()
    for mark in (root / "report").glob("*/DONE"):
        manifest = read_manifest(mark.parent)
        with suppress(ValidationError):  # of another version's settings
            if _science(ExperimentSpec.model_validate(manifest.spec)) == _science(spec):
                found.add(manifest.inputs["comparison"])
    return found


def _science(spec: ExperimentSpec) -> dict[str, Any]:
    """Return what an experiment is about, and not where it runs and is kept."""
    return spec.model_dump(exclude={"resources", "storage", "name"})


def _arm(root: UPath, inputs: dict[str, str], label: str) -> tuple[Artifact, Artifact]:
    stages = {
        name.rpartition(".")[2]: key
        for name, key in inputs.items()
        if name.rpartition(".")[0] == label
    }
    verdicts = stages.pop("judge")
    (made, completions), *_ = stages.items()
    return finished(root / made / completions), finished(root / "judge" / verdicts)


def finished(folder: UPath) -> Artifact:
    """Return a finished stage by its folder.

    Raises:
        CorruptArtifactError: It is not as its manifest says.
    """
    return Artifact(path=folder, manifest=read_manifest(folder), reused=True)
