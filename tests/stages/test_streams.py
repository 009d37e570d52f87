"""Tables in pieces: the same rows, whole or not at all, and memory that does not grow."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from upath import UPath

from bench import streaming
from qresafe.errors import DataError
from qresafe.stages import imported, streams
from qresafe.stages.streams import PIECE, count_rows, read_rows, table_writer

SCHEMA = pa.schema([pa.field("n", pa.int32()), pa.field("text", pa.string())])


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_what_is_written_in_pieces_is_read_in_pieces(tmp_path: Path, scheme: str) -> None:
    path = UPath(f"{scheme}{tmp_path}/table.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"n": i, "text": f"row {i}"} for i in range(2 * PIECE + 5)]
    with table_writer(path, SCHEMA) as writer:
        for start in range(0, len(rows), 999):
            writer.write(rows[start : start + 999])
    pieces = list(read_rows(path, SCHEMA))
    assert [row for piece in pieces for row in piece] == rows
    assert max(map(len, pieces)) <= PIECE
    assert count_rows(path) == len(rows)


def test_the_file_does_not_depend_on_the_pieces(tmp_path: Path) -> None:
    rows = [{"n": i, "text": "x"} for i in range(PIECE + 10)]
    for name, size in (("a", 7), ("b", 5000)):
        with table_writer(UPath(tmp_path / name), SCHEMA) as writer:
            for start in range(0, len(rows), size):
                writer.write(rows[start : start + size])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_writer_that_is_killed_leaves_no_file(tmp_path: Path) -> None:
    path = UPath(tmp_path / "table.parquet")

    def killed() -> None:
        with table_writer(path, SCHEMA) as writer:
            writer.write([{"n": 1, "text": "x"}])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert not path.exists()


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": [1]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"no column 'text' in t.parquet: it has n"):
        list(read_rows(UPath(tmp_path / "t.parquet"), SCHEMA))


def peak(folder: Path, rows: int) -> int:
    """Return the most bytes that Python and numpy held while judging and comparing."""
    folder.mkdir()
    for place, label in enumerate("ab"):
        streaming.write_completions(folder / f"{label}.jsonl", rows, shift=place)
    streaming.one_step("import", folder)  # so that no library is loaded under the tracer
    tracemalloc.start()
    streaming.one_step("compare", folder)
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found


def test_memory_hardly_grows_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per row of two files: the columns, 50 bytes each, twice while they are put together.

    Held as Python rows they were a kilobyte each. bench/streaming.py measures up to a million.
    """
    for module in (streams, imported):
        monkeypatch.setattr(module, "PIECE", 250)
    peak(tmp_path / "warm", 50)  # what is imported and cached once counts for neither
    growth = peak(tmp_path / "long", 5000) - peak(tmp_path / "short", 500)
    assert growth < 4500 * 2 * 150
