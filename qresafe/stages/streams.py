"""Tables read and written piece by piece, so that memory does not grow with their length."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from qresafe.artifacts import is_local
from qresafe.errors import DataError
from qresafe.leftovers import aside
from qresafe.stages.runtime import Row

PIECE = 4096  # rows that are in memory at a time; also the row groups of what is written here
BUFFER = 1 << 18  # bytes of a column that are read ahead


def read_rows(path: UPath, schema: pa.Schema) -> Iterator[list[Row]]:
    """Yield a Parquet file's rows in pieces of at most `PIECE`.

    Args:
        path: A file on any storage.
        schema: The columns to read, cast to its types; others are not touched.

    Raises:
        DataError: A column is missing or of a type that cannot be cast.
    """
    with path.open("rb") as raw:
        # A whole row group may be the whole file: without a buffer, it would be in memory at once.
        file = pq.ParquetFile(pa.PythonFile(raw, mode="r"), buffer_size=BUFFER, pre_buffer=False)
        missing = [name for name in schema.names if name not in file.schema_arrow.names]
        if missing:
            remedy = f"it has {', '.join(file.schema_arrow.names)}"
            raise DataError(f"no column {missing[0]!r}", where=path.name, remedy=remedy)
        for batch in file.iter_batches(PIECE, columns=schema.names, use_threads=False):
            try:
                piece = pa.Table.from_batches([batch]).select(schema.names).cast(schema)
            except (pa.ArrowInvalid, ValueError) as error:
                raise DataError(f"wrong column type ({error})", where=path.name) from error
            yield piece.to_pylist()


def count_rows(path: UPath) -> int:
    """Return how many rows a Parquet file has, from its index alone."""
    with path.open("rb") as raw:
        return int(pq.read_metadata(pa.PythonFile(raw, mode="r")).num_rows)


class TableWriter:
    """Writes rows as a Parquet file, in row groups of `PIECE` whatever the pieces it is given."""

    def __init__(self, sink: IO[bytes], schema: pa.Schema) -> None:
        self._schema, self._waiting = schema, list[Row]()
        self._writer = pq.ParquetWriter(pa.PythonFile(sink, mode="w"), schema)

    def write(self, rows: Sequence[Row]) -> None:
        self._waiting.extend(rows)
        while len(self._waiting) >= PIECE:
            self._flush(PIECE)

    def close(self) -> None:
        if self._waiting:
            self._flush(len(self._waiting))
        self._writer.close()

    def abandon(self) -> None:
        """End what cannot be finished; the file is of no use."""
        self._waiting.clear()
        self._writer.close()

    def _flush(self, count: int) -> None:
        table = pa.Table.from_pylist(self._waiting[:count], schema=self._schema)
        self._writer.write_table(table, row_group_size=PIECE)
        del self._waiting[:count]


@contextmanager
def table_writer(path: UPath, schema: pa.Schema) -> Iterator[TableWriter]:
    """Give a writer of a file that a reader sees whole or not at all."""
    local = is_local(path)
    target = UPath(aside(path)) if local else path
    with target.open("wb") as sink:
        writer = TableWriter(sink, schema)
        try:
            yield writer
        except BaseException:
            writer.abandon()
            raise
        writer.close()
        if local:
            sink.flush()
            os.fsync(sink.fileno())
    if local:
        os.replace(str(target), str(path))
