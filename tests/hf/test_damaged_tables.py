"""Damaged tables that `make bench-hostile` found: one sentence each."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from qresafe.errors import DataError
from qresafe.hf.tables import read_table


def test_a_key_of_half_a_character(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"\\ud800": "Tell me"}\n')
    with pytest.raises(DataError, match=r"malformed key .*write keys as whole characters"):
        read_table(str(file))


def test_parquet_whose_text_is_no_utf8(tmp_path: Path) -> None:
    file = tmp_path / "p.parquet"
    text = pa.array([b"good", b"\xe8\xff"], pa.binary()).view(pa.utf8())
    parquet.write_table(pa.table({"prompt": text}), file)
    with pytest.raises(DataError, match=r"malformed Parquet .*Invalid UTF8"):
        read_table(str(file))
