"""A folder's safetensors as one table of tensors that can be read, and overwritten in place."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qresafe.errors import CorruptArtifactError, ModelError
from qresafe.hf.models import weight_files

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: file name, type, shape and byte range within the file."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFiles(Mapping[str, Tensor]):
    """Tensor name -> tensor, read from disk on access; headers only are kept in memory.

    Args:
        folder: A model folder, sharded or not.
        files: The files to take; None for the model's weights.

    Raises:
        ModelError: There are no safetensors.
        CorruptArtifactError: A header is malformed, or a file is missing or truncated.
    """

    def __init__(self, folder: Path, files: Iterable[Path] | None = None) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        for file in weight_files(folder) if files is None else files:
            self.entries |= read_header(file)

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        count = torch.Size(entry.shape).numel()
        if count == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        with (self.folder / entry.file).open("rb") as file:
            file.seek(entry.begin)
            data = bytearray(file.read(entry.end - entry.begin))
        return torch.frombuffer(data, dtype=entry.dtype, count=count).reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def by_file(self) -> dict[str, list[str]]:
        """Return file name -> its tensor names, in the order of the files."""
        files: dict[str, list[str]] = {}
        for name, entry in self.entries.items():
            files.setdefault(entry.file, []).append(name)
        return files

    def overwrite(self, folder: Path, name: str, value: Tensor) -> None:
        """Put `value` in the place of tensor `name` in `folder`, a copy of this one's folder.

        Raises:
            ModelError: `value` has another type or shape than the stored tensor.
        """
        entry = self.entries[name]
        if (value.dtype, tuple(value.shape)) != (entry.dtype, entry.shape):
            what = f"{name} is {entry.dtype} {entry.shape}, not {value.dtype} {tuple(value.shape)}"
            raise ModelError(what, where=str(folder))
        with (folder / entry.file).open("r+b") as file:
            file.seek(entry.begin)
            file.write(data_of(value))


def read_header(file: Path) -> dict[str, Entry]:
    """Return the tensors of one safetensors file, checked against its length.

    Raises:
        CorruptArtifactError: The header is malformed or the file is shorter than it says.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as reader:
            length = int.from_bytes(reader.read(8), "little")
            header = json.loads(reader.read(length) if length < size else b"")
        header.pop("__metadata__", None)
        return {
            name: _entry(file.name, value, start=8 + length, size=size)
            for name, value in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        remedy = "copy or download the model again"
        raise CorruptArtifactError(
            f"damaged weight file ({error})", where=str(file), remedy=remedy
        ) from None


def _entry(file: str, value: dict[str, object], *, start: int, size: int) -> Entry:
    if value["dtype"] not in DTYPES:
        # other 8-bit floats are left to formats that know them: never read here
        raise ValueError(f"dtype {value['dtype']} is not supported")
    dtype = DTYPES[str(value["dtype"])]
    shape = tuple(int(length) for length in value["shape"])  # type: ignore[attr-defined]
    begin, end = (start + int(offset) for offset in value["data_offsets"])  # type: ignore[attr-defined]
    if min(shape, default=0) < 0 or end - begin != torch.Size(shape).numel() * dtype.itemsize:
        raise ValueError("a tensor's length does not fit its shape")
    if not start <= begin <= end <= size:
        raise ValueError("a tensor lies outside the file")
    return Entry(file, dtype, shape, begin, end)


def data_of(value: Tensor) -> memoryview:
    """Return a tensor's bytes as they are stored."""
    flat = value.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())
