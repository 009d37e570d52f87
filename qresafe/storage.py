"""Folders that may live on remote storage, for libraries that know only local ones."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from upath import UPath

from qresafe.artifacts import Manifest, is_local
from qresafe.errors import CorruptArtifactError, DataError
from qresafe.integrity import damage

# What file systems call what changes with a file: S3, Google, Azure, HTTP, memory, sftp.
CHANGED = ("ETag", "etag", "md5Hash", "content_md5", "LastModified", "mtime", "created", "updated")


def local_folder(folder: str | Path | UPath) -> Path:
    """Return a local folder with the content of `folder`, downloading it once if it is remote.

    Args:
        folder: A local path or any fsspec URL of a *finished* folder: a remote one is kept under
            the cache by its URL, and fetched again if it is not as the stage's manifest says. A
            folder that no stage has made, as a model's, is kept by its files' sizes and times
            too: somebody may put another model there.

    Raises:
        CorruptArtifactError: The remote folder itself is damaged; its stage counts as unfinished
            from then on, so that the next run makes it again.
    """
    source = UPath(folder)
    if is_local(source):
        return Path(str(source))
    manifest = _manifest(source)
    known = f"{source}{'' if manifest else _listing(source)}"
    target = cache_folder() / hashlib.sha256(known.encode()).hexdigest()[:16]
    if target.exists() and _damage(source, target, manifest):
        shutil.rmtree(target)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            copy_tree(source, UPath(scratch) / "folder")
            if wrong := _damage(source, Path(scratch) / "folder", manifest):
                _stage_of(source).joinpath("DONE").unlink(missing_ok=True)
                remedy = "run again: the stage that made it is repeated"
                raise CorruptArtifactError(wrong, where=str(source), remedy=remedy)
            _move(Path(scratch) / "folder", target)
    return target


@contextmanager
def built_locally(target: Path | UPath) -> Iterator[Path]:
    """Give a local folder to build in; its content is `target`'s once the block ends well.

    What an earlier, killed attempt left in `target` is removed first: builders start anew.
    """
    target = UPath(target)
    if is_local(target):
        local = Path(str(target))
        shutil.rmtree(local, ignore_errors=True)
        local.mkdir(parents=True)
        yield local
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)
        copy_tree(UPath(scratch), target)


def children(folder: UPath) -> list[UPath]:
    """Return what lies in `folder`, by name: nothing where it does not exist.

    An object store has no folders, so that one which was made and not yet filled is not there.
    """
    try:
        return sorted(folder.iterdir(), key=lambda path: path.name)
    except (FileNotFoundError, NotADirectoryError):
        return []


def copy_tree(source: UPath, target: UPath) -> None:
    """Copy every file under `source` to the same place under `target`, in pieces of 4 MiB."""
    root = str(source)
    for path in sorted(source.rglob("*"), key=str):
        if not path.is_file():
            continue
        name = str(path)[len(root) :].lstrip("/")
        if ".." in name.split("/"):  # an object store takes such names; a file system follows them
            what = f"the name {name!r} leads out of the folder"
            raise DataError(what, where=root, remedy="do not use what lies there")
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as reader, copy.open("wb") as writer:
            shutil.copyfileobj(reader, writer, 1 << 22)


def _stage_of(source: UPath) -> UPath:
    """Return the stage's folder that `source`, or a folder in it, is."""
    return source if (source / "manifest.json").exists() else source.parent


def _manifest(source: UPath) -> Manifest | None:
    """Return the manifest of the stage that `source` is of; None: no stage has made it."""
    try:
        return Manifest.model_validate_json((_stage_of(source) / "manifest.json").read_text())
    except (FileNotFoundError, ValueError):
        return None


def _listing(source: UPath) -> str:
    """Return what tells whether a folder's files are still the same, without reading them."""
    told = []
    for path in sorted(source.rglob("*"), key=str):
        if path.is_file():
            info = path.fs.info(path.path)
            changed = next((info[key] for key in CHANGED if info.get(key) is not None), "")
            told.append([str(path), info.get("size"), str(changed)])
    return json.dumps(told)


def _damage(source: UPath, copy: Path, manifest: Manifest | None) -> str:
    """Return what is wrong with the copy of a stage's folder; empty: nothing is known."""
    if manifest is None:
        return ""
    inside = str(source)[len(str(_stage_of(source))) :].lstrip("/")
    prefix = f"{inside}/" if inside else ""
    for name, digest in manifest.files.items():
        if name.startswith(prefix):
            copied = UPath(copy / name[len(prefix) :])
            if wrong := damage(copied, digest, manifest.sizes.get(name)):
                return f"{wrong} file {name}"
    return ""


def cache_folder() -> Path:
    """Return where folders from elsewhere are kept: under QRESAFE_CACHE, or ~/.cache/qresafe."""
    home = os.environ.get("QRESAFE_CACHE") or "~/.cache/qresafe"
    return Path(home).expanduser() / "folders"


def _move(built: Path, target: Path) -> None:
    try:
        built.rename(target)
    except OSError:
        if not target.exists():  # else another process on this machine was faster
            raise
