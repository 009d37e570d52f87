"""The finished arms of a run's folder, found without the spec that made them."""

from __future__ import annotations

from upath import UPath

from qresafe.artifacts import Artifact, read_manifest
from qresafe.errors import DataError, nearest
from qresafe.stages.compare import Arms


def finished_arms(root: UPath, labels: tuple[str, ...]) -> Arms | None:
    """Return the named arms of the newest finished comparison that has them all.

    Args:
        root: A run's folder, <storage>/runs/<name>.
        labels: Names of arms.

    Returns:
        Label -> (its `generate` stage, its `judge` stage); None where nothing was compared yet.

    Raises:
        DataError: There is no such folder, or no comparison has these arms.
        CorruptArtifactError: A finished stage is not as its manifest says.
    """
    if not any((root / stage).is_dir() for stage in ("compare", "generate", "quantize")):
        remedy = "give a run's folder (<storage>/runs/<name>), or an experiment and --storage"
        raise DataError("no such run", where=str(root), remedy=remedy)
    done = [mark.parent for mark in (root / "compare").glob("*/DONE")]
    newest = sorted(done, key=lambda folder: (folder / "DONE").stat().st_mtime, reverse=True)
    known: set[str] = set()
    for folder in newest:
        manifest = read_manifest(folder)
        known |= set(manifest.spec["arms"])
        if set(labels) <= set(manifest.spec["arms"]):
            return {label: _arm(root, manifest.inputs, label) for label in labels}
    if not newest:
        return None
    missing = next((label for label in labels if label not in known), labels[0])
    raise DataError(f"no arm {missing!r}", where=str(root), remedy=nearest(missing, known))


def _arm(root: UPath, inputs: dict[str, str], label: str) -> tuple[Artifact, Artifact]:
    stages = {
        name.rpartition(".")[2]: key
        for name, key in inputs.items()
        if name.rpartition(".")[0] == label
    }
    verdicts = stages.pop("judge")
    (made, completions), *_ = stages.items()
    return _finished(root / made / completions), _finished(root / "judge" / verdicts)


def _finished(folder: UPath) -> Artifact:
    return Artifact(path=folder, manifest=read_manifest(folder), reused=True)
