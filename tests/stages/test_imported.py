"""Completions made elsewhere: what is accepted, and what each mistake is called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qresafe.artifacts import Run
from qresafe.errors import DataError
from qresafe.stages.imported import completions_of
from qresafe.stages.runtime import read_table

ROWS = [{"prompt": f"p {i}", "completion": f"c {i}"} for i in range(5)]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_jsonl_and_parquet_say_the_same(tmp_path: Path) -> None:
    run = Run(str(tmp_path), "r")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    made = [completions_of(run, tmp_path / "a.parquet")]
    made.append(completions_of(run, jsonl(tmp_path / "a.jsonl", ROWS)))
    first, second = (read_table(m.path / "completions.parquet").to_pylist() for m in made)
    assert first == second
    assert [row["completion"] for row in first] == [row["completion"] for row in ROWS]
    assert {row["axis"] for row in first} == {"harmful"}
    assert made[0].manifest.inputs["prompts"] == made[1].manifest.inputs["prompts"]


def test_a_folder_is_all_its_files_in_any_order(tmp_path: Path) -> None:
    run = Run(str(tmp_path), "r")
    for name, rows in (("one", ROWS[:2]), ("two", ROWS[2:])):
        (tmp_path / "f").mkdir(exist_ok=True)
        jsonl(tmp_path / "f" / f"{name}.jsonl", rows)
    folder = completions_of(run, tmp_path / "f")
    whole = completions_of(run, jsonl(tmp_path / "x.jsonl", ROWS[::-1]))
    assert folder.manifest.counts["rows"] == 5
    assert folder.manifest.inputs["prompts"] == whole.manifest.inputs["prompts"]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "p"}, "no text under 'completion' in .*line 2"),
        ({"prompt": "p", "completion": 3}, "no text under 'completion' in .*line 2"),
        ({"prompt": "p", "completion": "c", "axis": "harmfull"}, "axis 'harmfull' in .*line 2"),
        ({"prompt": "p", "completion": "c", "sample": "x"}, "wrong column type"),
        ({"prompt": "p 0", "completion": "again"}, "two completions of the same prompt"),
        (["p", "c"], "line is no JSON object in .*line 2"),
    ],
)
def test_a_mistake_is_named_by_its_line(tmp_path: Path, row: Any, told: str) -> None:
    path = jsonl(tmp_path / "x.jsonl", [ROWS[0], row])
    with pytest.raises(DataError, match=told):
        completions_of(Run(str(tmp_path), "r"), path)


def test_nothing_to_import(tmp_path: Path) -> None:
    run = Run(str(tmp_path), "r")
    with pytest.raises(DataError, match=r"no completions in .*absent"):
        completions_of(run, tmp_path / "absent")
    with pytest.raises(DataError, match=r"no completion in .*: give at least one"):
        completions_of(run, jsonl(tmp_path / "empty.jsonl", []))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "p", "completion": "\xff"}\n')
    with pytest.raises(DataError, match="not UTF-8"):
        completions_of(run, tmp_path / "latin.jsonl")
