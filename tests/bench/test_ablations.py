"""The ablations: the plan is valid, and the page says what the results say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import ablations_page
from bench.ablations import Found, Row, all_rows, kept_at, plan, planned_seeds, read, rows
from bench.ablations_page import reached
from bench.ablations_plots import races_plot
from bench.demo import Cell
from bench.kept import take
from bench.touched import overlaps, touched_shares
from qresafe.core.sparse_patch import SparseDiff
from qresafe.presets import load_experiment
from qresafe.stages import qpatch
from qresafe.variants import with_changes


@pytest.mark.parametrize("name", ["", "extremes", "qlora", "teachers"])
def test_every_row_of_a_plan_is_a_valid_experiment_of_its_own(name: str) -> None:
    whole = plan(name)
    base = load_experiment(whole["preset"])
    for seed in whole["seeds"]:
        found = list(rows(seed, whole))
        assert all(with_changes(base, row.settings) for row in found)
        assert len({(row.part, row.label) for row in found}) == len(found)


def test_what_others_build_on_comes_first_and_settings_that_go_together_are_one() -> None:
    found = list(rows(1, plan()))
    assert [row.label for row in found[:3]] == ["W", "control", "Q0"]
    (rank,) = [row for row in found if row.part == "rank" and row.label == "4"]
    assert rank.settings == {"patch": {"rank": 4, "alpha": 8}}


def test_all_seeds_of_a_row_follow_one_another() -> None:
    found = all_rows([0, 1], plan())
    first = [(row.part, row.label, row.seed) for row in found[:4]]
    assert first == [("bases", "W", 0), ("bases", "W", 1), ("bases", "control", 0),
                     ("bases", "control", 1)]  # fmt: skip


def test_headline_parts_have_more_seeds_than_the_others() -> None:
    assert planned_seeds(plan()) == [0, 1, 2, 3, 4]
    seeds = {part: {row.seed for row in all_rows([0, 1, 2, 3, 4], plan()) if row.part == part}
             for part in ("bases", "tau", "races", "rank")}  # fmt: skip
    assert seeds["bases"] == seeds["tau"] == seeds["races"] == {0, 1, 2, 3, 4}
    assert seeds["rank"] == {0, 1, 2}
    assert list(rows(5, plan())) == []


def test_the_shipped_model_does_not_teach_itself() -> None:
    assert planned_seeds(plan("teachers")) == [1, 2, 3, 4]  # with seed 0 it is W


def test_equal_rows_of_two_parts_are_kept_once_and_seeds_apart() -> None:
    by_name = {(row.part, row.label): row for row in rows(0, plan())}
    default = by_name["masks", "default"]
    same = replace(default, part="other", label="another name")
    assert kept_at("s", default) == kept_at("s", same)
    assert kept_at("s", default) != kept_at("s", replace(default, seed=1))
    assert kept_at("s", default) != kept_at("s", default, "dev")


CURVE = [[5, 1.0, 0.9], [10, 2.0, 0.04], [15, 3.0, 0.2], [20, 4.0, 0.05], [25, 5.0, 0.03]]


@pytest.mark.parametrize(
    ("bound", "stays", "at"), [(0.05, True, 20), (0.05, False, 10), (0.01, True, None)]
)
def test_a_race_ends_where_attack_success_stays_low(
    bound: float, stays: bool, at: int | None
) -> None:
    found = reached(CURVE, bound, stays)
    assert (found[0] if found else None) == at


def test_a_race_draws_every_seed(tmp_path: Path) -> None:
    row = Row("races", "tau .6", "Q", {}, 0)
    raced = [Found(replace(row, seed=seed), curve=CURVE) for seed in range(7)]
    races_plot({"tau .6": raced}, tmp_path / "races.svg")
    assert "seed 6" in (tmp_path / "races.svg").read_text()


def cell(attack: float, label: str, part: str, seed: int = 0) -> Cell:
    n = {"attack_success": 100, "over_refusal": 100, "exact_match": 100, "coherence": 100}
    measures: dict[str, float | None] = {"attack_success": attack, "over_refusal": 0.05,
                                         "exact_match": 0.9, "coherence": 1.0}  # fmt: skip
    return Cell(part, label, seed, n, measures, 0.9, 0.034, 1.3, 50.0)


def test_the_page_holds_means_intervals_races_and_refusals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablations_page, "DOCS", tmp_path)
    found = [
        Found(Row("bases", "W", "W", {}, 0), cell(0.02, "W", "bases"), "CPU", "2026-11-29"),
        Found(Row("rank", "4", "Q", {}, 0), cell(0.04, "4", "rank"), "CPU", "2026-11-29"),
        Found(Row("rank", "4", "Q", {}, 1), cell(0.08, "4", "rank", 1), "CPU", "2026-11-29"),
        Found(
            Row("races", "tau .6", "Q", {}, 0),
            cell(0.03, "t", "races"),
            "CPU",
            "2026-11-28",
            CURVE,
            0.02,
        ),
        Found(Row("masks", "odd", "Q", {}, 0), refused="no such layer"),
    ]
    ablations_page.write_page(found, planned=9, storage=str(tmp_path))
    page = (tmp_path / "results.md").read_text()
    assert "measured 2026-11-28 to 2026-11-29; CPU." in page
    assert "5 of the plan's 9 results, of which 1 are refusals." in page
    # 12 of 200: Wilson's middle is (12 + 1.92) / 203.84 = 6.8 %, and half its width 3.4.
    assert "| 4 | 6.0 (4.0/8.0) [3.5, 10.2] | 5.0 (5.0/5.0) |" in page
    # W answers 2 % of the race's prompts, so it ends below 4 %: first at step 10, then 20 % at
    # step 15, and to stay at step 25.
    assert "| tau .6 | 10 | 2.0 | 20 (15) | 25 | 5.0 | 3.0 | 0.20 |" in page
    assert "- masks, odd, seed 0: no such layer" in page
    assert (tmp_path / "results-rank.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("name", ["extremes", "qlora", "teachers"])
def test_a_committed_page_is_what_its_rows_make(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = ablations_page.DOCS
    take(docs / f"results-{name}.jsonl", str(tmp_path))
    monkeypatch.setattr(ablations_page, "DOCS", tmp_path)
    wanted = all_rows(planned_seeds(plan(name)), plan(name))
    kept = [(row, kept_at(str(tmp_path), row)) for row in wanted]
    found = [read(path, row) for row, path in kept if path.exists()]
    ablations_page.write_page(found, len(wanted), str(tmp_path), name)
    page = (docs / f"results-{name}.md").read_text()
    assert (tmp_path / f"results-{name}.md").read_text() == page


def test_overlaps_are_counted_code_by_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.layers.1.self_attn.q_proj"
    kept = {"a": {name: [1, 5, 9, 12]}, "b": {name: [5, 9, 13, 14, 15]}, "none": {}}

    def read(path: Path) -> tuple[None, qpatch.Changes]:
        codes = {
            layer: SparseDiff(20, torch.tensor(at), torch.ones(len(at), dtype=torch.int8))
            for layer, at in kept[path.name].items()
        }
        return None, qpatch.Changes(codes, scales={})

    monkeypatch.setattr(qpatch, "read", read)
    # Of a's 4 codes 5 and 9 are b's too; b changes 5 of the layer's 20.
    assert overlaps(Path("a"), Path("b")) == (0.5, 0.25)
    assert overlaps(Path("none"), Path("b")) is None
    assert touched_shares([Path("a"), Path("b")]) == {("q", 1): pytest.approx((0.2 + 0.25) / 2)}
