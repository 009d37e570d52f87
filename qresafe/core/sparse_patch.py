"""A patch as a sparse difference of codes: which changed, and by how much.

Sorted positions are stored in Elias-Fano form: the lower l bits of each as they are, the upper
bits in unary, together at most l + 2 bits a position with l = floor(log2(size / changes)). That is
within half a bit of the entropy of random positions, where byte-wide gaps need an escape for one
gap in a few. Changes are stored as signed nibbles, and those beyond +-7 in a list, each as wide as
a code: a byte, or two of 16-bit codes (AQLM's 1x16).
At a density of 0.01 % this is 15.3 + 4 bits, 2.4 bytes per changed code; at 5 %, 1.3 bytes.

A change is new - old modulo 256 (or 65536), so applying and reverting need the difference and
nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qresafe.errors import CorruptArtifactError

WIDTHS = (torch.int8, torch.int16)
_ESCAPE = 8  # the nibble that stands for "in the list of wide changes"

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class SparseDiff:
    """Changed codes of one tensor.

    Args:
        size: Number of codes of the whole tensor.
        positions: int64, sorted, distinct, in [0, size): into the flattened tensor.
        changes: int8 or int16, (new - old) modulo 2^8 or 2^16, never 0.
    """

    size: int
    positions: Tensor
    changes: Tensor

    def apply(self, codes: Tensor) -> Tensor:
        """Return the patched codes; the argument stays as it is."""
        return self._add(codes, self.changes)

    def revert(self, codes: Tensor) -> Tensor:
        """Return the codes from before the patch."""
        return self._add(codes, -self.changes)

    def _add(self, codes: Tensor, changes: Tensor) -> Tensor:
        fits = codes.dtype in WIDTHS and codes.itemsize >= changes.itemsize
        if codes.numel() != self.size or not fits:
            wanted = f"{self.size} {str(changes.dtype)[6:]} codes"
            what = f"a patch for {wanted}, not {codes.numel()} of {codes.dtype}"
            raise CorruptArtifactError(what, remedy="apply it to the checkpoint it was made for")
        patched = codes.clone().view(-1)
        patched[self.positions.to(codes.device)] += changes.to(codes.device, codes.dtype)
        return patched.view(codes.shape)

    def pack(self) -> dict[str, Tensor]:
        """Return the difference as named uint8 tensors, e.g. for safetensors."""
        changes = self.changes.numpy()
        narrow = np.abs(changes.astype(np.int32)) < _ESCAPE
        nibbles = np.where(narrow, changes & 15, _ESCAPE).astype(np.uint8)
        nibbles = np.append(nibbles, np.zeros(len(nibbles) % 2, dtype=np.uint8))
        packed = {
            "nibbles": nibbles[::2] | nibbles[1::2] << 4,
            "wide": changes[~narrow].astype(changes.dtype.newbyteorder("<")).view(np.uint8),
        }
        values = {name: torch.from_numpy(array.copy()) for name, array in packed.items()}
        return pack_positions(self.size, self.positions) | values


def pack_positions(size: int, positions: Tensor) -> dict[str, Tensor]:
    """Return sorted, distinct positions in [0, size) in Elias-Fano form, as uint8 tensors."""
    places = positions.numpy()
    shift = _lower_bits(size, len(places))
    upper = np.zeros((size >> shift) + len(places) + 1, dtype=np.uint8)
    upper[(places >> shift) + np.arange(len(places))] = 1
    lower = (places[:, None] >> np.arange(shift)) & 1
    packed = {
        "header": np.array([size, len(places)], dtype="<i8").view(np.uint8),
        "lower": np.packbits(lower.astype(np.uint8).reshape(-1), bitorder="little"),
        "upper": np.packbits(upper, bitorder="little"),
    }
    return {name: torch.from_numpy(array.copy()) for name, array in packed.items()}


def diff(old: Tensor, new: Tensor) -> SparseDiff:
    """Return the difference between two int8 or int16 code tensors of one shape."""
    if old.shape != new.shape or old.dtype != new.dtype or old.dtype not in WIDTHS:
        raise ValueError(f"cannot compare codes {old.shape} {old.dtype} {new.shape} {new.dtype}")
    before, after = old.cpu().reshape(-1), new.cpu().reshape(-1)
    positions = (before != after).nonzero()[:, 0]
    return SparseDiff(before.numel(), positions, after[positions] - before[positions])


def unpack(packed: Mapping[str, Tensor], where: str = "the patch") -> SparseDiff:
    """Return the difference that `SparseDiff.pack` packed.

    Args:
        packed: The named uint8 tensors.
        where: The file and layer, for messages.

    Raises:
        CorruptArtifactError: A tensor is missing, or lengths, positions or changes contradict
            each other; nothing outside the codes is ever touched.
    """
    size, positions = unpack_positions(packed, where)
    parts = {name: _bytes(packed, name, where) for name in ("nibbles", "wide")}
    changes = _changes(parts, len(positions), where)
    return SparseDiff(size, positions, torch.from_numpy(changes))


def unpack_positions(packed: Mapping[str, Tensor], where: str) -> tuple[int, Tensor]:
    """Return size and positions that `pack_positions` packed.

    Raises:
        CorruptArtifactError: A tensor is missing, or they contradict each other.
    """
    parts = {name: _bytes(packed, name, where) for name in ("header", "lower", "upper")}
    if len(parts["header"]) != 16:
        raise _corrupt("a header that is not 16 bytes long", where)
    size, count = (int(n) for n in parts["header"].view("<i8"))
    if not 0 <= count <= size:
        raise _corrupt(f"{count} changes among {size} codes", where)
    return size, torch.from_numpy(_positions(parts, size, count, where))


def _positions(
    parts: Mapping[str, Bytes], size: int, count: int, where: str
) -> npt.NDArray[np.int64]:
    shift = _lower_bits(size, count)
    bits = (size >> shift) + count + 1
    if len(parts["upper"]) != -(-bits // 8) or len(parts["lower"]) != -(-count * shift // 8):
        raise _corrupt("position lists of the wrong length", where)
    ones = np.flatnonzero(np.unpackbits(parts["upper"], bitorder="little"))
    if len(ones) != count:
        raise _corrupt(f"{len(ones)} positions for {count} changes", where)
    lower = np.unpackbits(parts["lower"], count=count * shift, bitorder="little")
    weights = np.int64(1) << np.arange(shift, dtype=np.int64)
    positions = ((ones - np.arange(count)) << shift) + lower.reshape(count, shift) @ weights
    if count and (positions[-1] >= size or (np.diff(positions) <= 0).any()):
        raise _corrupt("positions out of range or out of order", where)
    return positions.astype(np.int64)


def _changes(parts: Mapping[str, Bytes], count: int, where: str) -> npt.NDArray[Any]:
    """Return the changes; as int8 too where 16-bit codes changed by few steps only."""
    if len(parts["nibbles"]) != -(-count // 2):
        raise _corrupt("a list of changes of the wrong length", where)
    pairs = np.stack([parts["nibbles"] & 15, parts["nibbles"] >> 4], axis=1)
    nibbles = pairs.reshape(-1)[:count].astype(np.int8)
    wide = nibbles == _ESCAPE
    width = len(parts["wide"]) // max(int(wide.sum()), 1)
    if len(parts["wide"]) != width * int(wide.sum()) or (wide.any() and width not in (1, 2)):
        raise _corrupt("a list of wide changes of the wrong length", where)
    stored = "<i2" if width == 2 else "<i1"
    changes = np.where(nibbles > _ESCAPE, nibbles - 16, nibbles).astype(stored)
    changes[wide] = parts["wide"].view(stored)
    if (changes == 0).any():
        raise _corrupt("a change of 0", where)
    return changes


def _bytes(packed: Mapping[str, Tensor], name: str, where: str) -> Bytes:
    tensor = packed.get(name)
    if tensor is None or tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise _corrupt(f"no list of bytes {name!r}", where)
    return np.ascontiguousarray(tensor.cpu().numpy())


def _lower_bits(size: int, count: int) -> int:
    return (size // count).bit_length() - 1 if count else size.bit_length()


def _corrupt(what: str, where: str) -> CorruptArtifactError:
    return CorruptArtifactError(what, where=where, remedy="fetch or export the patch again")
