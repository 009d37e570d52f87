"""What lies under a storage root: runs, their stages, sizes and times; and how to remove some."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from upath import UPath

from qresafe import failure, progress_file
from qresafe.artifacts import Manifest, Run, client_errors, is_local, output_errors
from qresafe.driver_lock import Driver, sole_driver, working
from qresafe.errors import CorruptArtifactError, DataError, nearest
from qresafe.failure import Failure
from qresafe.progress_file import RunProgress

_PLACE = re.compile(r"(?P<run>[^/]+)/(?P<stage>[^/]+)/(?P<key>[^/]+)/(?P<file>.+)")
# What a run may have before it has stages.
_NOTE = re.compile(rf"[^/]+/({re.escape(failure.FILE)}|{re.escape(progress_file.FILE)})")
# What is written last: a stage's mark, and a search's page.
MARKS = {"search": "report.html"}
# The stages that a run has one of; where no report was made, they tell what its spec was.
SINGLE = ("quantize", "pairs", "reference", "patch", "export")


@dataclass
class StageFolder:
    """One stage's folder, finished or not.

    Attributes:
        path: The folder.
        finished: When its mark was written (seconds since 1970), None if it was not.
        bytes: Of all its files.
        work_bytes: Of these, what it only needed while it ran.
    """

    path: UPath
    finished: float | None = None
    bytes: int = 0
    work_bytes: int = 0

    @property
    def stage(self) -> str:
        return self.path.parent.name

    @property
    def key(self) -> str:
        return self.path.name

    @property
    def mark(self) -> str:
        """The file that is written last."""
        return MARKS.get(self.stage, "DONE")

    def manifest(self) -> Manifest:
        """Read how it was made, without looking at its files.

        Raises:
            CorruptArtifactError: The manifest is missing or unreadable.
            ResourceError: Its storage cannot be used from here.
        """
        path = self.path / "manifest.json"
        # What else a remote storage's client raises says nothing of the file.
        unreadable = OSError if is_local(path) else FileNotFoundError
        with client_errors(path):
            try:
                return Manifest.model_validate_json(path.read_text())
            except (unreadable, ValidationError, UnicodeDecodeError) as error:
                told = {"where": str(self.path), "remedy": f"delete {self.path} and run again"}
                raise CorruptArtifactError("unreadable manifest", **told) from error


@dataclass
class RunFolder:
    """One run: its stages by place, who works on it now, and how its last command ended.

    Attributes:
        path: Its folder.
        driver: Who works on it now; not a lost host, whose record on an object store is silent.
        stages: What it has, finished or not.
        failure: Why its last command failed, None if it did not.
        progress: How far it is or, without a driver, how far it was when that was killed.
    """

    path: UPath
    driver: Driver | None = None
    stages: list[StageFolder] = field(default_factory=list)
    failure: Failure | None = None
    progress: RunProgress | None = None

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def bytes(self) -> int:
        return sum(stage.bytes for stage in self.stages)

    @property
    def finished(self) -> list[StageFolder]:
        """The finished stages, newest first."""
        done = [stage for stage in self.stages if stage.finished is not None]
        return sorted(done, key=lambda stage: stage.finished or 0.0, reverse=True)

    @property
    def state(self) -> str:
        """Return how its last command ended, as far as its folder tells.

        "running"; "killed": its driver ended without a word; "failed": see `failure`;
        "unfinished": a stage was cut off; or "finished".
        """
        if self.driver:
            return "running"
        if self.progress:
            return "killed"
        if self.failure:
            return "failed"
        return "finished" if len(self.finished) == len(self.stages) else "unfinished"

    def newest(self, stage: str) -> StageFolder | None:
        """Return the stage's result that was finished last, if there is one."""
        return next((found for found in self.finished if found.stage == stage), None)


def find_runs(storage: str) -> list[RunFolder]:
    """Return the runs of a storage root, by name; one listing, whatever the storage is.

    Raises:
        DataError: There are no runs.
        ResourceError: There is no such storage, or it cannot be used from here.
    """
    root = Run(storage, "any").root.parent.absolute()
    with client_errors(root):
        return _runs_in(root)


def _runs_in(root: UPath) -> list[RunFolder]:
    if not root.is_dir():
        remedy = "give the --storage that the runs were made with"
        raise DataError("no runs", where=str(root), remedy=remedy)
    folders: dict[str, StageFolder] = {}
    notes: set[str] = set()
    for file, details in root.fs.find(root.path, detail=True).items():
        name = file[len(root.path) :].lstrip("/")
        if place := _PLACE.fullmatch(name):
            _count(folders, root, place, int(details["size"]))
        notes.add(name)
    names = {folder.path.parent.parent.name for folder in folders.values()}
    names |= {note.partition("/")[0] for note in notes if _NOTE.fullmatch(note)}
    runs = {name: _run(root / name, notes) for name in sorted(names)}
    for folder in folders.values():
        runs[folder.path.parent.parent.name].stages.append(folder)
    return list(runs.values())


def _run(path: UPath, files: Set[str]) -> RunFolder:
    failed, begun = (f"{path.name}/{file}" in files for file in (failure.FILE, progress_file.FILE))
    return RunFolder(
        path,
        working(path),
        failure=failure.read_failure(path) if failed else None,
        progress=progress_file.read_progress(path) if begun else None,
    )


def _count(folders: dict[str, StageFolder], root: UPath, place: re.Match[str], size: int) -> None:
    name = "/".join(place.group("run", "stage", "key"))
    folder = folders.setdefault(name, StageFolder(root / name))
    folder.bytes += size
    if place["file"].startswith("work/"):
        folder.work_bytes += size
    elif place["file"] == folder.mark:
        mark = folder.path / folder.mark
        folder.finished = mark.fs.modified(mark.path).timestamp()


def pick(runs: Iterable[RunFolder], name: str) -> RunFolder:
    """Return the run of that name.

    Raises:
        DataError: There is none.
    """
    known = {run.name: run for run in runs}
    if name not in known:
        raise DataError(f"no run named {name!r}", remedy=nearest(name, known))
    return known[name]


def differences(first: RunFolder, second: RunFolder) -> dict[str, tuple[Any, Any]]:
    """Return dotted key -> its value in each run, where they differ; None: not set there.

    Two runs with reports are compared by their whole specs, others by those of the stages that
    both have finished. Their names and storages are left out.

    Raises:
        DataError: They have no finished stage in common.
    """
    ours, theirs = spec_of(first), spec_of(second)
    both = ours.keys() & theirs.keys()
    if not both:
        remedy = "run both at least up to `quantize`"
        what = f"{first.name} and {second.name} have no finished stage in common"
        raise DataError(what, remedy=remedy)
    flat = [_flat({key: spec[key] for key in sorted(both)}) for spec in (ours, theirs)]
    keys = sorted(flat[0].keys() | flat[1].keys())
    pairs = {key: (flat[0].get(key), flat[1].get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def spec_of(run: RunFolder) -> dict[str, Any]:
    """Return the spec of a run's newest report, or what its finished stages know of theirs."""
    if report := run.newest("report"):
        whole = report.manifest().spec
        return {key: value for key, value in whole.items() if key not in ("name", "storage")}
    found = {stage: run.newest(stage) for stage in SINGLE}
    return {stage: made.manifest().spec for stage, made in found.items() if made}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            value = {str(place): each for place, each in enumerate(value)}
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


@dataclass(frozen=True)
class Removal:
    """What a prune would remove of one run.

    Attributes:
        run: The run.
        paths: Folders that go.
        bytes: How much that frees.
        kept: What stays although it was asked for, and why; empty: nothing.
    """

    run: RunFolder
    paths: tuple[UPath, ...]
    bytes: int
    kept: str = ""


def plan_removal(run: RunFolder, *, whole: bool, force: bool) -> Removal:
    """Return what pruning a run would remove.

    Args:
        run: The run. One that has a driver is left alone.
        whole: Remove results too, not only the work files of finished stages.
        force: Remove unfinished stages too, which a later run would have continued.
    """
    if run.driver:
        return Removal(run, (), 0, kept=f"in use by {run.driver}")
    if not force and any(s.stage == "search" and s.finished is None for s in run.stages):
        # Its trials are finished stages, and the next ones may go on from their checkpoints.
        return Removal(run, (), 0, kept="all, for an unfinished search (--force removes it)")
    chosen = [s for s in run.stages if s.finished is not None or force]
    left = len(run.stages) - len(chosen)
    kept = f"{left} unfinished (--force removes them)" if left else ""
    if whole and not left:
        return Removal(run, (run.path,), run.bytes)
    if whole:
        return Removal(run, tuple(s.path for s in chosen), sum(s.bytes for s in chosen), kept)
    worked = [s for s in chosen if s.work_bytes]
    return Removal(
        run, tuple(s.path / "work" for s in worked), sum(s.work_bytes for s in worked), kept
    )


def remove(removal: Removal) -> None:
    """Remove what was planned, holding the run; killed half-way, nothing broken looks finished.

    Raises:
        ResourceError: The run has a driver by now, or may not be written.
    """
    root = removal.run.path
    with client_errors(root), sole_driver(root), output_errors(root):
        for stage in removal.run.stages:
            if any(path in (root, stage.path) for path in removal.paths):
                (stage.path / stage.mark).unlink(missing_ok=True)
        for path in removal.paths:
            path.fs.rm(path.path, recursive=True)
