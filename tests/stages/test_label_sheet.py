"""Blinded sheets: what they show, what is noticed, and what labels say of a judge."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from fabricated import row

from qresafe.errors import DataError
from qresafe.stages.judge_error import evaluate_sheet
from qresafe.stages.label_sheet import (
    Key,
    Labels,
    check_unchanged,
    key_path,
    read_key,
    read_sheet,
    write_sheet,
)

ROWS = {
    "W": [row("harmful", i, f"answer {i} of the first") for i in range(6)],
    "Q0": [row("harmful", i, f"answer {i} of the second") for i in range(6)],
}
PATHS = {"W": "/w", "Q0": "/q0"}


@pytest.fixture
def sheet(tmp_path: Path) -> Path:
    path = tmp_path / "sheet.csv"
    write_sheet(path, ROWS, PATHS, n=8, seed=3)
    return path


def lines(sheet: Path) -> list[dict[str, str]]:
    with sheet.open(newline="") as file:
        return list(csv.DictReader(file))


def fill(sheet: Path, *people: list[str]) -> None:
    """Write each person's labels into a column of their own."""
    rows = lines(sheet)
    names = ["label", *(f"label_{i}" for i in range(2, len(people) + 1))]
    for name, labels in zip(names, people, strict=True):
        for line, label in zip(rows, labels, strict=True):
            line[name] = label
    with sheet.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*("id", "prompt", "completion"), *names])
        writer.writeheader()
        writer.writerows(rows)


def test_a_sheet_tells_no_model_and_leads_back_by_its_key(sheet: Path) -> None:
    found = lines(sheet)
    assert len({line["id"] for line in found}) == 8
    assert set(found[0]) == {"id", "prompt", "completion", "label"}
    key = read_key(key_path(sheet))
    for line in found:
        item = key.items[line["id"]]
        number = int(item.prompt_id.removeprefix("harmful-"))
        assert line["completion"] == ROWS[item.source][number]["completion"]
    assert {item.source for item in key.items.values()} == {"W", "Q0"}
    drawn = [(i.source, i.prompt_id) for i in key.items.values()]
    assert drawn != sorted(drawn, reverse=True)  # shuffled


def test_a_seed_draws_the_same_sheet(sheet: Path, tmp_path: Path) -> None:
    write_sheet(tmp_path / "again.csv", ROWS, PATHS, n=8, seed=3)
    assert (tmp_path / "again.csv").read_text() == sheet.read_text()
    write_sheet(tmp_path / "other.csv", ROWS, PATHS, n=8, seed=4)
    assert (tmp_path / "other.csv").read_text() != sheet.read_text()


def test_a_sheet_is_never_overwritten(sheet: Path) -> None:
    with pytest.raises(DataError, match="exists already"):
        write_sheet(sheet, ROWS, PATHS, n=8, seed=3)


def test_a_spreadsheet_computes_nothing(tmp_path: Path) -> None:
    rows = {"W": [row("harmful", 0, "=1+1")]}
    write_sheet(tmp_path / "s.csv", rows, {"W": "/w"}, n=1, seed=0)
    assert lines(tmp_path / "s.csv")[0]["completion"] == "'=1+1"


def test_labels_are_read_by_person(sheet: Path) -> None:
    fill(sheet, ["Refused "] * 4 + ["complied"] * 4, ["refused"] * 3 + ["complied"] * 4 + [""])
    labels = read_sheet(sheet, read_key(key_path(sheet)))
    assert [len(said) for said in labels.people.values()] == [8, 7]
    # The fourth is one against one.
    assert len(labels.consensus()) == 7


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda t: t.replace("label", "lable", 1), "no column id or label"),
        (lambda t: t.replace("\n", "\nnobody,p,c,refused\n", 1), "not in the key"),
        (lambda t: t + t.splitlines()[1] + "refused\n", "repeats an id"),
        (
            lambda t: "\n".join(
                x + ("refusd" if i == 1 else "") for i, x in enumerate(t.splitlines())
            ),
            "did you mean refused",
        ),
        (lambda t: t, "no label"),
        (lambda t: t.splitlines()[0], "no line"),
    ],
)
def test_a_malformed_sheet_is_one_sentence(sheet: Path, change, fragment: str) -> None:
    sheet.write_text(change(sheet.read_text()))
    with pytest.raises(DataError, match=fragment):
        read_sheet(sheet, read_key(key_path(sheet)))


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such key"):
        read_key(tmp_path / "absent.key.json")
    (tmp_path / "x.key.json").write_text(json.dumps({"seed": 1}))
    with pytest.raises(DataError, match="not the key"):
        read_key(tmp_path / "x.key.json")
    with pytest.raises(DataError, match="no such sheet"):
        read_sheet(tmp_path / "absent.csv", Key(seed=0, sources={}, items={}))


def test_other_completions_are_noticed(sheet: Path) -> None:
    key = read_key(key_path(sheet))
    texts = {(s, r["prompt_id"], 0): r["completion"] for s, rows in ROWS.items() for r in rows}
    check_unchanged(key, texts)
    item = next(iter(key.items.values()))
    with pytest.raises(DataError, match="another one"):
        check_unchanged(key, texts | {(item.source, item.prompt_id, 0): "changed"})
    del texts[item.source, item.prompt_id, 0]
    with pytest.raises(DataError, match="gone"):
        check_unchanged(key, texts)


def test_a_judge_that_misses_every_fifth_answer_is_corrected(tmp_path: Path) -> None:
    # 40 complied, 60 refused; the judge calls 8 of the 40 refused and nothing else wrongly.
    rows = [row("harmful", i, "complied" if i < 40 else "refused") for i in range(100)]
    said = ["refused" if i < 8 else r["completion"] for i, r in enumerate(rows)]
    key = write_sheet(tmp_path / "s.csv", {"Q": rows}, {"Q": "/q"}, n=100, seed=0)
    truth = {name: rows[int(i.prompt_id.split("-")[1])] for name, i in key.items.items()}
    people = {"label": {name: found["completion"] for name, found in truth.items()}}
    result = evaluate_sheet(Labels(people=people), key, {"Q": (rows, {"judge": said})})
    (found,) = result.judges
    assert found.confusion == {
        "complied": {"complied": 32, "refused": 8},
        "refused": {"refused": 60},
    }
    assert found.sensitivity.share == pytest.approx(0.8)
    assert found.specificity.share == 1.0
    # 92 of 100 the same; by chance .32 * .4 + .68 * .6 = .536; (.92 - .536) / .464
    assert found.kappa == pytest.approx(0.384 / 0.464)
    (rate,) = found.corrected
    assert rate.raw.share == pytest.approx(0.32)
    assert rate.rate == pytest.approx(0.4)  # (.32 + 1 - 1) / (.8 + 1 - 1)
    assert rate.low is not None
    assert rate.high is not None
    assert rate.low < 0.4 < rate.high
