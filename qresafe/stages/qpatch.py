"""*.qpatch: the few codes that a patch changes, and its scales, in one safetensors file.

Its tensors are packed sparse differences, of codes "<layer>/<part>" and of scales
"<layer>/scale/<part>", these by their bits as 16-bit words; a file that changes scales is format
qpatch-2, one that does not qpatch-1. Its metadata holds the sha256 of every file of Q0 and of Q.

Nothing is written before Q0 (or, to revert, Q) has the expected hashes, and the result appears only
once it has the other ones. A .gguf file alone stands for its folder: its own hash is asked for, and
what is written is a .gguf file too.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from qresafe.artifacts import disk_errors, hash_file, write_bytes
from qresafe.core import sparse_patch
from qresafe.core.scales import scale_of
from qresafe.core.sparse_patch import SparseDiff
from qresafe.errors import CorruptArtifactError, ModelError
from qresafe.hf.checkpoint import QuantizedCheckpoint
from qresafe.hf.gguf_folder import gguf_file, unpacked
from qresafe.hf.models import CONTENT
from qresafe.leftovers import aside

CODES_ONLY, WITH_SCALES = "qpatch-1", "qpatch-2"
SCALE = "/scale"
GGUF = ".gguf"
REMEDY = "fetch or export the patch again"
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")  # no separators: hashes name plain files
State = Literal["base", "patched"]


@dataclass(frozen=True)
class Header:
    """What a patch belongs to.

    Attributes:
        base: File name -> sha256 of all files of Q0.
        patched: The same of Q.
        key: Of the patch stage's artefact: which training made it.
        scales_changed: How many scales differ.
    """

    base: dict[str, str]
    patched: dict[str, str]
    key: str
    scales_changed: int = 0


@dataclass(frozen=True)
class Changes:
    """What a patch changes, layer by layer.

    Attributes:
        codes: Layer -> difference of its codes.
        scales: Layer -> difference of its scales' bits, as 16-bit words.
    """

    codes: dict[str, SparseDiff]
    scales: dict[str, SparseDiff]

    @property
    def codes_changed(self) -> int:
        return sum(len(change.positions) for change in self.codes.values())


def create(base: Path, patched: Path, target: Path, key: str = "") -> dict[str, Any]:
    """Write the difference between two checkpoints that differ in codes, or scales, only.

    Args:
        base: Q0's folder, or .gguf file.
        patched: Q's, made by `QuantizedCheckpoint.rewrite`.
        target: The *.qpatch file to write.
        key: Kept in the header.

    Returns:
        Counts: codes, codes changed (in all and by layer), bytes, and where the format stores
        plain scales, how many there are and how many changed.

    Raises:
        ModelError: Q could not be turned into Q0 again, or a file has a name that no patch may
            carry.
    """
    before, after = _opened(base), _opened(patched)
    hashes = file_hashes(base), _renamed(file_hashes(patched), patched, base)
    _check_names(hashes[0], base)
    tensors: dict[str, Tensor] = {}
    by_layer: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for name in before.names:
        change = sparse_patch.diff(before.read(name).codes, after.read(name).codes)
        sizes[name] = change.size
        by_layer[name] = len(change.positions)
        if by_layer[name]:
            _check_reversible(before, name)
            tensors |= {f"{name}/{part}": value for part, value in change.pack().items()}
    packed = sum(tensor.nbytes for tensor in tensors.values())
    scales = _scale_changes(before, after, tensors) if before.has_scales else {}
    header = Header(*hashes, key, scales.get("scales_changed", 0))
    # One entry only: safetensors writes several in random order, and equal patches are equal bytes.
    metadata = {"header": json.dumps(_told(header), sort_keys=True)}
    write_bytes(target, save(tensors, metadata=metadata))
    return _counts(by_layer, sizes, packed, target) | scales


def apply(patch: Path, base: Path, target: Path) -> dict[str, Any]:
    """Write Q = Q0 + patch to the new folder (for a .gguf file: the new file) `target`.

    Raises:
        ModelError: `base` is not the patch's Q0, or `target` exists.
        CorruptArtifactError: The patch file is damaged.
    """
    return _convert(patch, base, target, "base", "patched")


def revert(patch: Path, patched: Path, target: Path) -> dict[str, Any]:
    """Write Q0 = Q - patch to the new `target`, as `apply` does: Q0's files, byte for byte.

    Raises:
        ModelError: `patched` is not the patch's Q, or `target` exists.
        CorruptArtifactError: The patch file is damaged.
    """
    return _convert(patch, patched, target, "patched", "base")


def verify(patch: Path, checkpoint: Path) -> dict[str, Any]:
    """Say whether a checkpoint is the patch's Q0 ("base") or its Q ("patched").

    Raises:
        ModelError: It is neither; the message names a file that differs.
        CorruptArtifactError: The patch file is damaged.
    """
    header, changes = read(patch)
    found = file_hashes(checkpoint)
    for state in ("base", "patched"):
        if found == _meant(header, state, checkpoint):
            return {"checkpoint": state} | _changed(header, changes) | {"patch_key": header.key}
    meant = _meant(header, "base", checkpoint)
    raise _stranger(found, meant, checkpoint, "neither the patch's Q0 nor its Q")


def read(patch: Path) -> tuple[Header, Changes]:
    """Read and check a whole patch file.

    Raises:
        CorruptArtifactError: Anything in it is missing, malformed or out of range.
    """
    if not Path(patch).is_file():
        raise ModelError("no such patch file", where=str(patch), remedy="give a *.qpatch file")
    try:
        with safe_open(str(patch), framework="pt") as file:
            metadata = file.metadata() or {}
            packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(str(error), patch) from None
    header = _header(metadata, patch)
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in packed.items():
        layer, _, part = name.rpartition("/")
        layers.setdefault(layer, {})[part] = tensor
    changes = Changes({}, {})
    for layer, parts in layers.items():
        change = sparse_patch.unpack(parts, f"{patch}, layer {layer!r}")
        of_scales = layer.endswith(SCALE)
        (changes.scales if of_scales else changes.codes)[layer.removesuffix(SCALE)] = change
    return header, changes


def file_hashes(folder: Path) -> dict[str, str]:
    """Return file name -> sha256 of what makes the model: weights, config, tokenizer.

    Raises:
        ModelError: There is no such folder.
    """
    if is_lone(folder):
        return {Path(folder).name: hash_file(Path(folder))}
    if not Path(folder).is_dir():
        raise ModelError("no such checkpoint", where=str(folder), remedy="give its folder")
    files = [file for file in sorted(Path(folder).iterdir()) if file.suffix in CONTENT]
    return {file.name: hash_file(file) for file in files if file.is_file()}


def _convert(patch: Path, source: Path, target: Path, have: State, want: State) -> dict[str, Any]:
    source, target = Path(source), Path(target)
    if target.exists():
        raise ModelError(f"{target} exists already", remedy="give a new path, or remove it")
    if is_lone(source) and target.suffix != GGUF:
        remedy = f"give a path that ends in {GGUF}"
        raise ModelError("the result is a .gguf file too", where=str(target), remedy=remedy)
    header, changes = read(patch)
    checkpoint = _opened(source)
    found, meant = file_hashes(source), _meant(header, have, source)
    if found != meant:
        name = "Q0" if have == "base" else "Q"
        raise _stranger(found, meant, source, f"not the patch's {name}")
    unknown = sorted({*changes.codes, *changes.scales} - set(checkpoint.names))
    if unknown:
        raise _damaged(f"it names a layer {unknown[0]!r} that the checkpoint lacks", patch)

    def check(made: Path) -> None:
        made = gguf_file(made) or made if is_lone(source) else made
        if file_hashes(made) != _meant(header, want, made):
            raise _damaged("the result does not have the hashes that it promises", patch)

    step = SparseDiff.apply if have == "base" else SparseDiff.revert
    codes = _Stepped(changes.codes, step, lambda name: checkpoint.read(name).codes)
    scales = _Stepped(changes.scales, step, lambda name: scale_of(checkpoint.read(name).grid))
    with disk_errors(str(target)):
        if is_lone(source):
            _write_file(checkpoint, target, codes, check)
        else:
            checkpoint.rewrite(target, codes, check, scales)
    return {"checkpoint": want, "folder": str(target)} | _changed(header, changes)


def is_lone(path: Path) -> bool:
    """Return whether a path is a .gguf file, not a checkpoint's folder."""
    return Path(path).suffix == GGUF and Path(path).is_file()


def _opened(path: Path) -> QuantizedCheckpoint:
    if is_lone(path):
        return QuantizedCheckpoint.open(unpacked(Path(path)))
    if not Path(path).exists():
        raise ModelError("no such checkpoint", where=str(path), remedy="give its folder")
    if not (Path(path) / "config.json").is_file() and (file := gguf_file(Path(path))):
        raise ModelError("a .gguf file without config.json", where=str(path), remedy=f"give {file}")
    return QuantizedCheckpoint.open(path)


def _meant(header: Header, state: State, path: Path) -> dict[str, str]:
    """Return the hashes that `path` should have: a lone .gguf file's, whatever it is called."""
    hashes: dict[str, str] = getattr(header, state)
    if not is_lone(path):
        return hashes
    return {Path(path).name: value for name, value in hashes.items() if name.endswith(GGUF)}


def _write_file(
    checkpoint: QuantizedCheckpoint,
    target: Path,
    codes: Mapping[str, Tensor],
    check: Callable[[Path], None],
) -> None:
    scratch = target.with_name(aside(target.stem))
    try:
        made = gguf_file(checkpoint.rewrite(scratch, codes, check))
        assert made is not None  # `checkpoint` is of one
        made.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _renamed(hashes: dict[str, str], path: Path, like: Path) -> dict[str, str]:
    """Return a lone .gguf file's hash under the name of another one; a folder's as they are."""
    return {Path(like).name: value for value in hashes.values()} if is_lone(path) else hashes


def _check_names(hashes: Mapping[str, str], folder: Path) -> None:
    if odd := [name for name in hashes if not FILE_NAME.fullmatch(name)]:
        remedy = "rename it to letters, digits, dots, hyphens and underscores"
        raise ModelError(
            f"a patch cannot name the file {odd[0]!r}", where=str(folder), remedy=remedy
        )


def _check_reversible(base: QuantizedCheckpoint, name: str) -> None:
    """Refuse a layer whose codes, packed again, are not its bytes: they could not be restored."""
    tensor, packed = base.codec.pack(name, base.read(name).codes)
    if not torch.equal(packed, base.files[tensor]):
        what = f"{tensor} holds more than its codes, which a patch could not restore"
        raise ModelError(what, where=str(base.folder), remedy="pack the checkpoint again")


def _scale_changes(
    before: QuantizedCheckpoint, after: QuantizedCheckpoint, tensors: dict[str, Tensor]
) -> dict[str, int]:
    """Add the packed differences of scales to `tensors`; return how many scales changed."""
    total = changed = 0
    for name in before.names:
        old, new = (scale_of(one.read(name).grid) for one in (before, after))
        total += old.numel()
        change = sparse_patch.diff(words(old), words(new))
        if not len(change.positions):
            continue
        changed += int((words(old) != words(new)).view(old.numel(), -1).any(1).sum())
        tensor, packed = before.pack_scale(name, old)
        if not torch.equal(packed, before.files[tensor]):
            what = f"{tensor} holds more than its scales, which a patch could not restore"
            raise ModelError(what, where=str(before.folder), remedy="set patch.trains to codes")
        tensors |= {f"{name}{SCALE}/{part}": value for part, value in change.pack().items()}
    return {"scales": total, "scales_changed": changed}


def words(values: Tensor) -> Tensor:
    """Return floats by their bits, as int16 words (float32: two each); codes as they are."""
    return values.contiguous().view(torch.int16) if values.is_floating_point() else values


def _changed(header: Header, changes: Changes) -> dict[str, int]:
    scales = {"scales_changed": header.scales_changed} if changes.scales else {}
    return {"codes_changed": changes.codes_changed} | scales


class _Stepped(Mapping[str, Tensor]):
    """Layer -> codes (or scales) after (or before) the patch, computed one layer at a time."""

    def __init__(
        self, changes: Mapping[str, SparseDiff], step: Any, read: Callable[[str], Tensor]
    ) -> None:
        self._changes, self._step, self._read = changes, step, read

    def __getitem__(self, name: str) -> Tensor:
        old = self._read(name)
        stepped: Tensor = self._step(self._changes[name], words(old))
        return stepped.view(old.dtype)

    def __iter__(self) -> Any:
        return iter(self._changes)

    def __len__(self) -> int:
        return len(self._changes)


def _told(header: Header) -> dict[str, Any]:
    """Return what the metadata say of a patch; without scales, what they always did."""
    told = asdict(header)
    if header.scales_changed:
        return {"format": WITH_SCALES} | told
    del told["scales_changed"]
    return {"format": CODES_ONLY} | told


def _header(metadata: Mapping[str, str], patch: Path) -> Header:
    try:
        told = json.loads(metadata["header"])
        written = told.pop("format")
        if written not in (CODES_ONLY, WITH_SCALES):
            what = f"format {written!r} instead of {CODES_ONLY!r} or {WITH_SCALES!r}"
            raise CorruptArtifactError(what, where=str(patch), remedy="use the matching qresafe")
        header = Header(**told)
        names = [*header.base, *header.patched]
        sound = header.base.keys() == header.patched.keys() and isinstance(header.key, str)
        sound = sound and isinstance(header.scales_changed, int)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise _damaged("its header is malformed", patch) from None
    odd = [name for name in names if not FILE_NAME.fullmatch(name)]
    if odd or not sound:
        raise _damaged(f"its header names the file {odd[0]!r}" if odd else "malformed", patch)
    return header


def _counts(
    by_layer: dict[str, int], sizes: dict[str, int], packed: int, target: Path
) -> dict[str, Any]:
    changed, total = sum(by_layer.values()), sum(sizes.values())
    return {
        "codes": total,
        "codes_changed": changed,
        "fraction_changed": changed / total,
        "changed_by_layer": by_layer,
        "codes_by_layer": sizes,
        "patch_bytes": target.stat().st_size,
        "bytes_per_changed_code": packed / changed if changed else 0.0,
    }


def _stranger(
    found: Mapping[str, str], meant: Mapping[str, str], folder: Path, what: str
) -> ModelError:
    differing = sorted(n for n in {*found, *meant} if found.get(n) != meant.get(n))
    what = f"the checkpoint is {what} ({differing[0] if differing else 'a file'} differs)"
    return ModelError(what, where=str(folder), remedy="use the checkpoint the patch was made for")


def _damaged(what: str, patch: Path) -> CorruptArtifactError:
    return CorruptArtifactError(f"damaged patch: {what}", where=str(patch), remedy=REMEDY)
