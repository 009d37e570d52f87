"""The pages of the paper's tables are made from the rows that stand beside them."""

from __future__ import annotations

import json
from pathlib import Path

from bench import reproduce
from bench.kept import take, write_rows


def test_every_page_is_what_the_committed_rows_make(tmp_path: Path) -> None:
    storage, pages = tmp_path / "storage", tmp_path / "pages"
    take(reproduce.PAGES / reproduce.ROWS, str(storage))
    wanted = reproduce.tasks(reproduce.table_names(), (0, 1, 2), str(storage))
    reproduce.write_pages(wanted, str(storage), pages)
    names = sorted(path.name for path in reproduce.PAGES.iterdir())
    assert sorted(path.name for path in pages.iterdir()) == names
    for name in names:
        assert (pages / name).read_text() == (reproduce.PAGES / name).read_text(), name


def test_rows_that_were_measured_again_take_the_place_of_equals(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    write_rows({"b": {"row": 1}, "a": {"row": 2}}, file)
    write_rows({"b": {"row": 3}}, file)
    held = [json.loads(line) for line in file.read_text().splitlines()]
    assert held == [{"key": "a", "row": 2}, {"key": "b", "row": 3}]


def test_rows_of_a_file_do_not_replace_what_was_measured_here(tmp_path: Path) -> None:
    file, storage = tmp_path / "rows.jsonl", tmp_path / "storage"
    here = storage / "rows" / "a.json"
    here.parent.mkdir(parents=True)
    here.write_text('{"row": 1}')
    file.write_text('{"key": "a", "row": 2}\n{"key": "b", "row": 3}\n')
    take(file, str(storage))
    assert json.loads(here.read_text()) == {"row": 1}
    assert json.loads((storage / "rows" / "b.json").read_text()) == {"row": 3}
