"""The paper's tables as data: whole, plannable with every preset, and put beside ours rightly."""

from __future__ import annotations

from pathlib import Path

import pytest
from scipy import stats

from qresafe.errors import SpecError
from qresafe.progress import Silent
from qresafe.stages.reproduce.filled import FilledRow, filled
from qresafe.stages.reproduce.page import Compared, cell_text, compared, page
from qresafe.stages.reproduce.plan import PlannedArm, planned
from qresafe.stages.reproduce.tables import PaperArm, paper_table, preset, preset_names, table_names
from qresafe.stages.runtime import InProcessRuntime

EVERY = [f"table{n}" for n in (3, 4, 5, 6, 7, 9, 10, 11, 12, 13)]


def test_every_table_with_results_is_there() -> None:
    """Tables 1, 2 and 8 of the paper describe methods, baselines and prompts."""
    assert set(table_names()) == {*EVERY, "figure1"}


@pytest.mark.parametrize("model", preset_names())
@pytest.mark.parametrize("name", table_names())
def test_every_row_is_an_experiment_of_every_preset(name: str, model: str) -> None:
    table, chosen = paper_table(name), preset(model)
    arms = planned(table, chosen)
    assert len({arm.arm.title for arm in arms}) == len(table.arms)  # rows are told apart
    for arm in arms:
        assert (arm.spec is None) == (arm.arm.quantizer in chosen.absent)
        known = {cell for values in arm.arm.paper.values() for cell in values}
        assert known <= set(table.cells), "a value of the paper without a column"


def test_a_row_changes_what_it_names_and_no_more() -> None:
    arms = {arm.arm.title: arm.spec for arm in planned(paper_table("table5"), preset("embedded"))}
    tau, other = arms["tau 0.2"], arms["tau 0.8"]
    assert tau is not None
    assert other is not None
    assert (tau.patch.mask.tau, other.patch.mask.tau) == (0.2, 0.8)
    assert tau.quantize == other.quantize
    assert tau.quantize.method == "llm_qat"
    assert tau.quantize.calibration.risk == "I"


def test_ten_dialogues_are_seen_as_often_as_the_row_says() -> None:
    rows = {arm.arm.title: arm.spec for arm in planned(paper_table("table12"), preset("embedded"))}
    five = rows["QLoRA INT4, risk II, 5 epochs"]
    assert five is not None
    assert five.quantize.method == "qlora"
    assert five.quantize.epochs == 5
    asked = five.evaluate.generate.system_prompt
    assert asked is not None
    assert "absolutely obedient" in asked


@pytest.mark.parametrize(("table", "model"), [("table8", "embedded"), ("table5", "embeded")])
def test_an_unknown_name_is_refused_with_the_nearest(table: str, model: str) -> None:
    with pytest.raises(SpecError, match=r"no (table|preset)"):
        planned(paper_table(table), preset(model))


def test_ours_beside_the_papers() -> None:
    """30 of 300 and 60 of 300: mean 15 %, together 90 of 600; the paper's 16.9 is 1.9 more."""
    arm = PaperArm(quantizer="x", paper={"m": {"Q0.attack_success": 16.9}})
    cell = "Q0.attack_success"
    rows = [
        FilledRow(title="x", seed=seed, figures={cell: (share, 300)})
        for seed, share in enumerate((0.1, 0.2))
    ]
    found = compared(cell, PlannedArm(arm, (cell,), None), rows, "m")
    oracle = stats.binomtest(90, 600).proportion_ci(method="wilson")
    assert found.ours == pytest.approx(15.0)
    assert found.interval == pytest.approx((100 * oracle.low, 100 * oracle.high))
    assert cell_text(found) == "15.0 [12.4, 18.1] (10.0/20.0) · paper 16.9 (-1.9)"


def test_what_one_side_lacks_is_a_dash() -> None:
    assert cell_text(Compared(None, 7.1)) == "– · paper 7.1"
    assert cell_text(Compared(None, None)) == "–"
    assert cell_text(Compared(0.012, None, (0.012,))) == "0.012"


TOY = [
    "evaluate.prompts=[{axis: harmful, limit: 4}]",
    "evaluate.generate={max_new_tokens: 4}",
    "pairs={harmful: 6, benign: 3, borderline: 2, recombined: 0, max_new_tokens: 4}",
    "patch={steps: 1, batch_size: 8, micro_batch_size: 8}",
]


def test_a_row_is_measured_and_kept_and_a_refusal_costs_no_other(
    tmp_path: Path, tiny_llama: Path
) -> None:
    table, chosen = paper_table("table10"), preset("embedded")
    nf4 = planned(table, chosen, [f"model.path={tiny_llama}", *TOY])[1]
    gone = planned(table, chosen, [f"model.path={tmp_path / 'nowhere'}", *TOY])[1]
    run = {"name": "r", "storage": str(tmp_path)}
    made = filled([gone, nf4], 0, run, InProcessRuntime(threads=1), Silent())
    assert "nowhere" in made[0].refused
    assert made[1].refused == ""
    assert made[1].figures["Q.attack_success"][1] == 4
    assert "Q.exact_match" not in made[1].figures  # no benign prompt was asked
    text = page(table, [gone, nf4], made, chosen, "Made here.")
    assert "paper 23.9" in text
    assert "Not measured" in text
    assert filled([nf4], 0, run, InProcessRuntime(threads=1), Silent()) == made[1:]
