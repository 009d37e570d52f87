"""The page of `bench.flips`, by arithmetic on made-up rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench import touched
from bench.flips import Found, Row, place, read, rows
from bench.flips_page import aims_table, page, touched_part, write_page

W = {"attack_success": [3, 300], "over_refusal": [15, 300], "exact_match": [360, 400]}
Q0 = {"attack_success": [300, 300], "over_refusal": [0, 300], "exact_match": [356, 400]}
Q = {"attack_success": [12, 300], "over_refusal": [3, 300], "exact_match": [355, 400]}
COHERENT = {"coherence": [1000, 1000]}
ARMS = {"W": W | COHERENT, "Q0": Q0 | COHERENT, "Q": Q | COHERENT}
LOOK = {"step": 10, "codes": 40, "attack_success": 0.5, "over_refusal": 0.01}
FOUND = Found(Row("INT2", 0, "flips", "test"), ARMS, 800_000, 400, 60.0, [LOOK])


def test_aims_by_hand() -> None:
    """ASR 4 - 1 = 3; over-refusal |1 - 5| = 4 > 3; exact match 89 - 88.75; 400 of 800 000 codes."""
    lines = aims_table([FOUND]).splitlines()[2:]
    told = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [(row[3], row[4]) for row in told] == [
        ("3.0", "1 of 1"),
        ("4.0", "0 of 1"),
        ("0.2", "1 of 1"),
        ("0.050", "1 of 1"),
    ]


def test_the_page_has_both_methods_and_the_plot(tmp_path: Path) -> None:
    lora = replace(FOUND, row=Row("INT2", 0, "masked_lora", "test"), changed=8000, curve=[])
    second = replace(FOUND, row=Row("INT2", 1, "flips", "test"), changed=600)
    write_page([FOUND, second, lora], "test", "no patch is kept here", tmp_path)
    text = (tmp_path / "results-flips.md").read_text()
    assert "| Q, code flips | 4.0 (4.0/4.0) |" in text
    assert "| 500 (400/600) | 0.062 (0.050/0.075) | 60 (60/60) |" in text
    assert "| Q, LoRA patch | 4.0 | 1.0 | 88.8 | 100.0 | 8000 | 1.000 | 60 |" in text
    assert (tmp_path / "results-flips.svg").read_text().startswith("<?xml")
    assert "On the way" not in page([lora], "test")


def test_what_flips_touch_is_counted_code_by_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 flips 2 are among the 5 codes of 20 that the LoRA patch changes; places rank alike."""
    q, k = (f"model.layers.0.self_attn.{name}_proj" for name in "qk")
    kept = {"a": {q: [1, 5, 9], k: [2]}, "lora": {q: [5, 9, 13, 14, 15]}, "b": {q: [3, 4], k: [7]}}

    def changes(path: Path) -> dict[str, tuple[int, np.ndarray]]:
        return {name: (10, np.array(at)) for name, at in kept[path.name].items()}

    monkeypatch.setattr(touched, "changes_of", changes)
    seeds = {("INT4", 0, "flips"): Path("a"), ("INT4", 0, "masked_lora"): Path("lora"),
             ("INT4", 1, "flips"): Path("b")}  # fmt: skip
    assert "| INT4 | 50.0 | 25.0 | 1.00 |" in touched_part(seeds)
    assert touched_part({}) == ""


def test_rows_have_places_of_their_own(tmp_path: Path) -> None:
    every = [*rows([0, 1], "test"), *rows([0, 1], "dev")]
    assert len({place(str(tmp_path), row) for row in every}) == len(every) == 24


def test_a_row_is_read_as_it_was_kept(tmp_path: Path) -> None:
    import json
    from dataclasses import asdict

    path = tmp_path / "row.json"
    path.write_text(json.dumps(asdict(FOUND)))
    assert read(path) == FOUND
