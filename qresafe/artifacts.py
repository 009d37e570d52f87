"""Where results live: <storage>/runs/<name>/<stage>/<key>/, with a manifest and a DONE mark.

The key is a hash of the stage, its slice of the spec, the keys of its inputs and the stage's code
version. A stage run again with the same inputs is a no-op; killed half-way it finds its own parts
in the same folder and continues. `DONE` is written last.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from upath import UPath

from qresafe.errors import CorruptArtifactError, ResourceError, UserError
from qresafe.integrity import damage, tell
from qresafe.integrity import hash_file as hash_file
from qresafe.leftovers import MARK, aside, sweep
from qresafe.patience import not_answering, passes, patiently
from qresafe.progress import Progress
from qresafe.provenance import git_revision, hardware, versions
from qresafe.redaction import redact


class Manifest(BaseModel):
    """What made an artefact: enough to explain and to repeat it."""

    model_config = ConfigDict(frozen=True)

    stage: str
    key: str
    code_version: int
    spec: dict[str, Any]
    inputs: dict[str, str]  # input name -> key of that artefact, or content hash of a user's file
    counts: dict[str, Any] = Field(default_factory=dict)  # what the stage says of its own work
    versions: dict[str, str] = Field(default_factory=dict)
    hardware: dict[str, Any] = Field(default_factory=dict)
    git: str | None = None
    seconds: float = 0.0
    files: dict[str, str] = Field(default_factory=dict)  # relative path -> sha256
    sizes: dict[str, int] = Field(default_factory=dict)  # relative path -> bytes
    remade: str = ""  # what was wrong with an earlier result, so that this one replaced it


class Artifact(BaseModel):
    """A finished stage's folder and manifest."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    path: UPath
    manifest: Manifest
    reused: bool = False  # True: found finished, nothing was computed

    @property
    def key(self) -> str:
        return self.manifest.key

    def shown(self, progress: Progress, name: str) -> Artifact:
        """Tell `progress` of it if it was found finished; one that was made has told already."""
        if self.reused:
            progress.start(name)
            progress.finish(reused=True)
        return self


class Run:
    """One named run under a storage root.

    Args:
        storage: A local folder or any fsspec URL (s3://, gs://, memory://).
        name: The run's name; its artefacts live under <storage>/runs/<name>.

    Raises:
        ResourceError: No file system is known for the URL's scheme.
    """

    def __init__(self, storage: str, name: str) -> None:
        try:
            self.root = _remembering_no_listing(UPath(storage)) / "runs" / name
        except (ValueError, ImportError) as error:  # an unknown scheme, or its package is missing
            remedy = "give a local folder or a URL such as s3://bucket/path"
            raise ResourceError(
                f"no such storage ({error})", where=storage, remedy=remedy
            ) from None
        self.name = name

    def check(self) -> None:
        """Write a file and remove it, before hours of work end in "permission denied".

        Raises:
            ResourceError: The storage cannot be reached or written.
        """
        probe = self.root / f".probe-{os.getpid()}"
        with output_errors(self.root), client_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            write_text(probe, "")
            probe.unlink()

    def folder(self, stage: str, key: str) -> UPath:
        return self.root / stage / key

    def stage(
        self,
        stage: str,
        *,
        spec: Mapping[str, Any],
        inputs: Mapping[str, str],
        code_version: int,
        work: Callable[[UPath], Mapping[str, Any]],
    ) -> Artifact:
        """Run `work` once for these inputs, or return what an earlier run made of them.

        Args:
            stage: The stage's name ("generate", "patch", ...).
            spec: The part of the spec that the result depends on, as JSON-able data.
            inputs: Input name -> key (`Artifact.key`) or content hash.
            code_version: Raised by hand when the stage's meaning changes.
            work: Fills the folder that it is given and returns the counts for the manifest. It
                is called again on the same folder after a kill, and must continue there. So it is
                when a finished result is damaged: that is told, removed and made again.
        """
        key = stage_key(stage, spec, inputs, code_version)
        folder = self.folder(stage, key)
        before, damaged = finished_manifest(folder)
        if before and not damaged:
            return Artifact(path=folder, manifest=before, reused=True)
        if damaged:
            tell(f"{damaged}: the {stage} stage is run again")
            discard(folder)
        with output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with disk_errors(str(folder)):
            began = time.perf_counter()
            counts = dict(work(folder))
            if is_local(folder):
                sweep(Path(str(folder)))
            manifest = Manifest(
                stage=stage,
                key=key,
                code_version=code_version,
                spec=dict(spec),
                inputs=dict(inputs),
                counts=counts,
                versions=versions(),
                hardware=hardware(),
                git=git_revision(),
                seconds=round(time.perf_counter() - began, 3),
                files=hash_folder(folder),
                sizes=folder_sizes(folder),
                remade=damaged,
            )
            if before and (others := different(before, manifest)):
                tell(f"{folder} has other bytes than before in {', '.join(others)}")
            text = redact(manifest.model_dump_json(indent=1))  # before its hash is taken
            write_text(folder / "manifest.json", text)
            write_text(folder / "DONE", done_mark(text, key))
        return Artifact(path=folder, manifest=manifest)


def _remembering_no_listing(storage: UPath) -> UPath:
    """Return the same path, never answered from a listing made before another host wrote there."""
    if is_local(storage):
        return storage
    return UPath(storage, use_listings_cache=False)


def stage_key(
    stage: str, spec: Mapping[str, Any], inputs: Mapping[str, str], code_version: int
) -> str:
    """Return the 16-hex-digit name of a stage's result."""
    return content_key([stage, spec, dict(sorted(inputs.items())), code_version])


def content_key(data: Any) -> str:
    """Return a 16-hex-digit hash of JSON-able data."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def done_mark(manifest: str, key: str) -> str:
    """Return what stands in DONE: the manifest's hash, and the result's key."""
    return f"{hashlib.sha256(manifest.encode()).hexdigest()} {key}"


def read_manifest(folder: UPath) -> Manifest:
    """Read a finished stage's manifest, and check it and all its files (see `integrity.damage`).

    Raises:
        CorruptArtifactError: The manifest is unreadable or changed, or a file is missing, cut off
            or changed.
    """
    manifest, damaged = finished_manifest(folder)
    if manifest and not damaged:
        return manifest
    remedy = f"delete {folder} and run again"
    raise CorruptArtifactError(damaged or "missing file DONE", where=str(folder), remedy=remedy)


def finished_manifest(folder: UPath) -> tuple[Manifest | None, str]:
    """Return a finished stage's manifest, as far as it can be read, and what is wrong; or nothing.

    Nothing is wrong with what is not there: an unfinished stage gives (None, "").
    """
    try:
        mark = read_text(folder / "DONE")
    except FileNotFoundError:
        return None, ""
    except UnicodeDecodeError:
        mark = ""
    try:
        text = read_text(folder / "manifest.json")
        manifest = Manifest.model_validate_json(text)
    except (ValueError, FileNotFoundError):
        return None, f"unreadable manifest in {folder}"
    # Earlier versions wrote the key alone.
    if mark not in (done_mark(text, manifest.key), manifest.key):
        return None, f"changed file manifest.json or DONE in {folder}"
    for name, digest in manifest.files.items():
        if wrong := damage(folder / name, digest, manifest.sizes.get(name)):
            return manifest, f"{wrong} file {name} in {folder}"
    return manifest, ""


def discard(folder: UPath) -> None:
    """Remove a damaged result; parts and checkpoints stay, as each of them is checked by itself."""
    with output_errors(folder):
        (folder / "DONE").unlink(missing_ok=True)  # first: it is what makes a result count
        (folder / "manifest.json").unlink(missing_ok=True)
        for path in results_in(folder).values():
            path.unlink()


def different(before: Manifest, after: Manifest) -> list[str]:
    """Return the files that two makings of a result do not agree in; times may stand in them."""
    names = before.files.keys() | after.files.keys()
    return sorted(name for name in names if before.files.get(name) != after.files.get(name))


def write_text(path: UPath | Path, text: str) -> None:
    """Write `text`, without secrets, so that a reader sees all of it or nothing."""
    write_bytes(path, redact(text).encode())


def write_bytes(path: UPath | Path, data: bytes) -> None:
    """Write `data` so that a reader sees all of it or nothing (object stores do so by nature)."""
    if not is_local(path):
        patiently(lambda: path.write_bytes(data), path)
        return
    with new_file(path) as made:
        made.write_bytes(data)


@contextmanager
def new_file(path: UPath | Path) -> Iterator[Path]:
    """Give a local file to write, which becomes `path` when the block ends well."""
    if isinstance(path, UPath) and not is_local(path):
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder, "made")
            yield made
            patiently(lambda: path.fs.put_file(str(made), path.path), path)
        return
    made = Path(aside(path))
    try:
        yield made
        with made.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(made, str(path))
    except OSError:
        with suppress(OSError):
            made.unlink()  # half a file would take the room that is short
        raise


def read_bytes(path: UPath) -> bytes:
    """Read a file; an object store that fails for a moment is asked again."""
    return path.read_bytes() if is_local(path) else bytes(patiently(path.read_bytes, path))


def read_text(path: UPath) -> str:
    """Read a file of text likewise.

    Raises:
        UnicodeDecodeError: It is no text, which a file of ours always is: it is damaged.
    """
    return read_bytes(path).decode()


def is_local(path: UPath | Path) -> bool:
    """Return whether `path` is on a file system that the operating system mounts."""
    return isinstance(path, Path) or getattr(path, "protocol", "") in ("", "file", "local")


def results_in(folder: UPath) -> dict[str, UPath]:
    """Return relative path -> file of all files under `folder`, but work files and marks."""
    skip = {"DONE", "manifest.json"}
    root = str(folder)
    found: dict[str, UPath] = {}
    for path in sorted(folder.rglob("*"), key=str):
        name = str(path)[len(root) :].lstrip("/")
        if name in skip or name.startswith("work/") or MARK in name or not path.is_file():
            continue
        found[name] = path
    return found


def hash_folder(folder: UPath) -> dict[str, str]:
    """Return relative path -> sha256 of `results_in` a folder."""
    return {name: hash_file(path) for name, path in results_in(folder).items()}


def folder_sizes(folder: UPath) -> dict[str, int]:
    """Return relative path -> bytes of `results_in` a folder."""
    return {name: int(path.stat().st_size) for name, path in results_in(folder).items()}


@contextmanager
def disk_errors(where: str) -> Iterator[None]:
    """Turn a full, read-only or failing disk into one sentence; what was finished stays."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = "free some space and run again: finished parts are kept"
            raise ResourceError("the disk is full", where=where, remedy=remedy) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            remedy = "give a storage that you may write to"
            raise ResourceError("cannot write", where=where, remedy=remedy) from error
        if passes(error):
            raise not_answering(error, where) from error
        raise
    except Exception as error:
        if passes(error):  # of a client of an object store, which has errors of its own
            raise not_answering(error, where) from error
        raise


@contextmanager
def output_errors(path: UPath | Path) -> Iterator[None]:
    """Turn whatever is wrong with a path that is only written to into one sentence.

    A stage's work stays with `disk_errors`: there, a missing file may be one to read.
    """
    try:
        with disk_errors(str(path)):
            yield
    except (FileNotFoundError, FileExistsError, IsADirectoryError) as error:
        remedy = "give a path that you may write to"
        raise ResourceError("cannot write", where=str(path), remedy=remedy) from error


@contextmanager
def client_errors(path: UPath) -> Iterator[None]:
    """Turn what a remote storage's client raises into one sentence: each has errors of its own."""
    try:
        yield
    except UserError:  # it is a sentence already
        raise
    except Exception as error:
        if is_local(path):
            raise
        told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        remedy = "check its address, your keys for it, and the network"
        what = f"the storage cannot be used ({told})"
        raise ResourceError(what, where=str(path), remedy=remedy) from error


def check_output(path: Path) -> None:
    """Make a file's folder and see that it can be written, before hours of work.

    Raises:
        ResourceError: It cannot, or the path is a folder.
    """
    probe = path.parent / f".probe-{os.getpid()}"
    with output_errors(path):
        if path.is_dir():
            raise IsADirectoryError(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(probe, "")
        probe.unlink()
