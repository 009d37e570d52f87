"""Safetensors written tensor by tensor, so that a file may be larger than memory.

The format's header comes first and names every tensor's place, which is known at the end only. So
tensors go to a scratch file as they come, and are copied from there in the order that
`safetensors.torch.save_file` gives them: the bytes are the same as its own.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from torch import Tensor

from qresafe.hf.tensor_files import DTYPES, TensorFiles, data_of

INDEX = "model.safetensors.index.json"
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Widest first, as safetensors sorts its types; within one type by name.
ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E4M3", "I8", "U8", "BOOL")
PIECE = 1 << 22
FORMAT = {"format": "pt"}  # what transformers asks of a weight file


@contextmanager
def tensor_writer(
    path: Path, metadata: Mapping[str, str] | None = None
) -> Iterator[Callable[[str, Tensor], None]]:
    """Give a function that adds a named tensor to a new safetensors file."""
    placed: dict[str, tuple[str, list[int], int, int]] = {}  # type, shape, begin, length
    with tempfile.TemporaryFile(dir=path.parent) as scratch:

        def add(name: str, value: Tensor) -> None:
            data, begin = data_of(value), scratch.tell()
            scratch.write(data)
            placed[name] = NAMES[value.dtype], list(value.shape), begin, len(data)

        yield add
        order = sorted(placed, key=lambda name: (ORDER.index(placed[name][0]), name))
        with path.open("wb") as file:
            file.write(_header(placed, order, metadata))
            for name in order:
                _copy(scratch, file, *placed[name][2:])


def _header(
    placed: Mapping[str, tuple[str, list[int], int, int]],
    order: list[str],
    metadata: Mapping[str, str] | None,
) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        dtype, shape, _, length = placed[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + length]}
        end += length
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _copy(source: IO[bytes], target: IO[bytes], begin: int, length: int) -> None:
    source.seek(begin)
    while length:
        piece = source.read(min(PIECE, length))
        target.write(piece)
        length -= len(piece)


def write_shards(
    folder: Path, files: TensorFiles, convert: Callable[[str], Mapping[str, Tensor]]
) -> None:
    """Write a model's weight files anew, in as many files as they are.

    Args:
        folder: Where to; one tensor of the model is in memory at a time.
        files: The model.
        convert: Given a tensor's name, returns what takes its place.
    """
    weight_map: dict[str, str] = {}
    total = 0
    for file, names in files.by_file().items():
        with tensor_writer(folder / file, FORMAT) as add:
            for name in names:
                for new, value in convert(name).items():
                    add(new, value)
                    weight_map[new] = file
                    total += value.nbytes
    if (files.folder / INDEX).is_file():
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))
