"""Completions that another program made, taken in as if a `generate` stage had made them."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from qresafe.artifacts import Artifact, Run, content_key, hash_file, read_manifest
from qresafe.errors import DataError, nearest
from qresafe.jsonl import read_jsonl
from qresafe.records import COMPLETION
from qresafe.stages.columns import hashed
from qresafe.stages.generate import FILE
from qresafe.stages.measures import AXES
from qresafe.stages.runtime import Row
from qresafe.stages.streams import BUFFER, PIECE, table_writer

CODE_VERSION = 2
NEEDED = ("prompt", "completion")
SUFFIXES = (".jsonl", ".parquet")
# What a foreign file need not say; lengths of 0 and no ids mean "not known".
DEFAULTS: Row = {
    "axis": "harmful",
    "sample": 0,
    "completion_ids": [],
    "prompt_tokens": 0,
    "new_tokens": 0,
    "finish": "stop",
}


def completions_of(run: Run, source: Path) -> Artifact:
    """Return the completions at `source` as an artefact.

    Args:
        run: Where a foreign file's copy goes.
        source: The folder of a finished `generate` stage, or its completions.parquet; or a JSONL
            or Parquet file with at least prompt and completion, or a folder of such files. Where
            axis is missing, prompts are harmful; where prompt_id is, equal prompts are the same
            prompt.

    Raises:
        DataError: There is no such file, or it is malformed.
        CorruptArtifactError: A finished stage's folder is not as its manifest says.
    """
    folder = source if source.is_dir() else source.parent
    if (folder / "DONE").exists() and (source.is_dir() or source.name == FILE):
        return Artifact(path=UPath(folder), manifest=read_manifest(UPath(folder)), reused=True)
    files = _files(source)
    prompts = _check(files, source)

    def work(folder: UPath) -> Mapping[str, Any]:
        with table_writer(folder / FILE, COMPLETION) as writer:
            for rows in _pieces(files):
                writer.write([_completed(row) for _, row in rows])
        return {"rows": prompts.rows, "from": str(source)}

    return run.stage(
        "import",
        spec={},
        # The prompts are an input of their own, whatever their order.
        inputs={
            "file": content_key([hash_file(file) for file in files]),
            "prompts": prompts.key(),
        },
        code_version=CODE_VERSION,
        work=work,
    )


class _Prompts:
    """The prompts of a file, as hashes; told of every row, it notices what is wrong."""

    def __init__(self) -> None:
        self._keys, self._asked = array("q"), array("q")

    @property
    def rows(self) -> int:
        return len(self._keys)

    def add(self, where: str, row: Row) -> None:
        axis = row["axis"]
        if axis not in AXES:
            remedy = nearest(str(axis), AXES)
            raise DataError(f"axis {axis!r}", where=where, remedy=remedy)
        self._keys.append(hashed(row["prompt_id"], row["sample"]))
        self._asked.append(hashed(row["prompt_id"], row["sample"], axis, row["prompt"]))

    def repeated(self) -> bool:
        keys = np.frombuffer(self._keys, np.int64)
        keys.sort()  # in place: at a million rows, a copy would be what one notices
        return bool((keys[1:] == keys[:-1]).any())

    def key(self) -> str:
        asked = np.frombuffer(self._asked, np.int64)
        asked.sort()
        return hashlib.sha256(asked.data).hexdigest()[:16]


def _check(files: Sequence[Path], source: Path) -> _Prompts:
    """Read all of a source once, so that a mistake in its last line costs no judging."""
    prompts = _Prompts()
    for rows in _pieces(files):
        for where, row in rows:
            prompts.add(where, _completed(row))
        _castable([_completed(row) for _, row in rows], rows[0][0])
    if not prompts.rows:
        raise DataError("no completion", where=str(source), remedy="give at least one")
    if prompts.repeated():
        remedy = "number repeated answers by a column `sample`, or make prompt_id unique"
        raise DataError("two completions of the same prompt", where=str(source), remedy=remedy)
    return prompts


def _castable(rows: list[Row], where: str) -> None:
    try:
        pa.Table.from_pylist(rows, schema=COMPLETION)
    except (pa.ArrowInvalid, pa.ArrowTypeError, ValueError) as error:
        raise DataError(f"wrong column type ({error})", where=where) from error


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    found = sorted(file for file in source.glob("*") if file.suffix in SUFFIXES)
    if found:
        return found
    remedy = f"give a JSONL or Parquet file, or a folder with them or with {FILE}"
    raise DataError("no completions", where=str(source), remedy=remedy)


def _pieces(files: Sequence[Path]) -> Iterator[list[tuple[str, Row]]]:
    """Yield (where, row) of all files, in pieces."""
    for file in files:
        read = _parquet if file.suffix == ".parquet" else _jsonl
        yield from read(file)


def _parquet(path: Path) -> Iterator[list[tuple[str, Row]]]:
    try:
        file = pq.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError("not a Parquet file", where=str(path)) from error
    names = file.schema_arrow.names
    for name in NEEDED:
        if name not in names:
            raise DataError(f"no column {name!r}", where=str(path), remedy=nearest(name, names))
    known = [name for name in names if name in COMPLETION.names]
    for batch in file.iter_batches(PIECE, columns=known, use_threads=False):
        yield [(str(path), row) for row in batch.to_pylist()]


def _jsonl(path: Path) -> Iterator[list[tuple[str, Row]]]:
    piece: list[tuple[str, Row]] = []
    for number, row in read_jsonl(path):
        where = f"{path}, line {number}"
        for name in NEEDED:
            if not isinstance(row.get(name), str):
                remedy = nearest(
                    name, [key for key, value in row.items() if isinstance(value, str)]
                )
                raise DataError(f"no text under {name!r}", where=where, remedy=remedy)
        piece.append((where, {key: row[key] for key in COMPLETION.names if key in row}))
        if len(piece) == PIECE:
            yield piece
            piece = []
    if piece:
        yield piece


def _completed(row: Row) -> Row:
    given = {key: value for key, value in row.items() if value is not None}
    return {"prompt_id": content_key(row["prompt"]), **DEFAULTS, "completion": "", **given}
