"""Seals: whatever bit flips and wherever a file ends, it is found or it changes nothing."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from upath import UPath

from qresafe.artifacts import write_text
from qresafe.errors import CorruptArtifactError
from qresafe.integrity import (
    BLANK,
    SEAL_KEY,
    damage,
    is_sealed,
    open_json,
    seal_holds,
    sealed,
    sealed_json,
)
from qresafe.stages.runtime import is_whole, read_table, write_table

TABLE = pa.table({"id": ["a", "b", "c"], "logp": [-1.5, None, 2.0], "ids": [[1, 2], [], [3]]})
ROW = {"index": 3, "params": {"lr": 1e-4}, "metrics": {"asr": 0.125, "drop": None}, "ok": True}


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_a_seal_is_the_hash_of_all_else() -> None:
    data = b"head" + BLANK + b"tail"
    digest = hashlib.sha256(b"head" + BLANK + b"tail").hexdigest().encode()
    assert sealed(data) == b"head" + BLANK[:-64] + digest + b"tail"
    assert seal_holds(sealed(data))
    assert not is_sealed(b"headtail")
    assert not seal_holds(b"headtail")


def test_text_that_looks_like_a_seal_is_no_trap(tmp_path: Path) -> None:
    table = pa.table({"completion": [BLANK.decode(), "x"]})
    write_table(UPath(tmp_path / "t"), table)
    assert is_whole(UPath(tmp_path / "t"))
    assert read_table(UPath(tmp_path / "t")).equals(table)


def test_a_sealed_table_is_an_ordinary_parquet_file(tmp_path: Path) -> None:
    kept = TABLE.replace_schema_metadata({"licence": "MIT"})
    write_table(UPath(tmp_path / "t"), kept)
    assert pq.read_table(tmp_path / "t").equals(kept)
    assert read_table(UPath(tmp_path / "t")).schema.metadata == kept.schema.metadata
    write_table(UPath(tmp_path / "u"), kept)
    assert (tmp_path / "t").read_bytes() == (tmp_path / "u").read_bytes()


def test_no_flipped_bit_of_a_table_is_read(tmp_path: Path) -> None:
    path = UPath(tmp_path / "t")
    write_table(path, TABLE)
    data = path.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(data)), 400):
        path.write_bytes(flipped(data, bit))
        assert not is_whole(path)
        if is_sealed(path.read_bytes()):
            with pytest.raises(CorruptArtifactError, match=r"changed file in .*t: run the stage"):
                read_table(path)
        else:  # the mark itself was hit, and the rows are as they were
            assert read_table(path).equals(TABLE)


def test_no_cut_table_is_read(tmp_path: Path) -> None:
    path = UPath(tmp_path / "t")
    write_table(path, TABLE)
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        assert not is_whole(path)
        with pytest.raises((CorruptArtifactError, pa.ArrowInvalid)):
            read_table(path)


def test_tables_of_other_programs_are_read_as_they_are(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "t")
    assert read_table(UPath(tmp_path / "t")).equals(TABLE)
    assert not is_whole(UPath(tmp_path / "t"))  # no part of ours


def test_no_flipped_bit_of_sealed_json_is_believed() -> None:
    data = sealed_json(ROW).encode()
    for bit in range(8 * len(data)):
        try:
            found = open_json(flipped(data, bit).decode())
        except ValueError:
            continue
        known = {name: value for name, value in found.items() if name in ROW}
        assert known == ROW  # the seal's own name was hit: nothing that was said changed


@pytest.mark.parametrize("text", ["", "[]", "3", '{"a": 1', '{"a": 1, "qresafe.seal": "0"}'])
def test_what_was_not_sealed_like_this_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        open_json(text)


def test_json_of_earlier_versions_has_no_seal() -> None:
    assert open_json(json.dumps(ROW)) == ROW
    assert SEAL_KEY not in open_json(sealed_json(ROW))


def test_large_files_of_an_object_store_are_checked_by_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qresafe import integrity

    file = UPath("memory://integrity/large")
    file.write_bytes(b"12345678")
    right = hashlib.sha256(b"12345678").hexdigest()
    assert damage(file, right, 8) == ""
    assert damage(file, "0" * 64, 8) == "changed"
    monkeypatch.setattr(integrity, "REMOTE_BYTES", 4)
    assert damage(file, "0" * 64, 8) == ""
    assert damage(file, right, 9) == "cut off"
    assert damage(file, right, 7) == "changed"
    assert damage(UPath("memory://integrity/none"), right, 7) == "missing"


def test_a_seal_holds_although_secrets_are_taken_out_of_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "correct-horse-1234")
    file = tmp_path / "row.json"
    write_text(file, sealed_json({"why": "401 for correct-horse-1234"}))
    assert "correct-horse" not in file.read_text()
    assert open_json(file.read_text())["why"].startswith("401 for ")
    assert "correct-horse" in sealed_json({"a": "correct-horse-1234"}, verbatim=True)
