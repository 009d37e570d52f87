"""The paper's tables as data: whole, plannable with every preset, and put beside ours rightly."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from scipy import stats

from qresafe.cli import main
from qresafe.embedded.calibration import OBEDIENT_AGENT
from qresafe.errors import SpecError
from qresafe.progress import Silent
from qresafe.specs import ExperimentSpec
from qresafe.stages.reproduce.filled import FilledRow, filled
from qresafe.stages.reproduce.measure import figures
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
    assert five.evaluate.generate.system_prompt == OBEDIENT_AGENT


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


def test_a_decoding_keeps_the_dot_of_its_number() -> None:
    table = paper_table("table4")
    text = page(table, planned(table, preset("embedded"), []), [], preset("embedded"), "")
    assert "| W attack temperature 0.95 | W attack temperature 0.7 | W attack top k 500 |" in text


def test_hours_of_two_machines_are_not_subtracted() -> None:
    arms = planned(paper_table("table6"), preset("embedded"), [])
    row = FilledRow(title=arms[0].arm.title, seed=0, figures={"hours": (0.02, 0)})
    text = page(paper_table("table6"), arms, [row], preset("embedded"), "Made here.")
    assert "| 0.02 · paper 8.4 |" in text


@pytest.mark.parametrize(("method", "devices"), [("masked_lora", 16), ("sft", 1)])
def test_hours_are_those_of_all_devices_that_train(method: str, devices: int) -> None:
    """Two workers of eight GPUs train as sixteen; TRL trains on one."""
    spec = ExperimentSpec.model_validate(
        {"patch": {"method": method}, "resources": {"workers": 2, "gpus_per_worker": 8}}
    )
    trained = SimpleNamespace(manifest=SimpleNamespace(counts={"seconds": 1800.0}))
    found = figures(SimpleNamespace(spec=spec, patched=trained), ["hours"])
    assert found["hours"].value == pytest.approx(0.5 * devices)


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
    toy = [*TOY, f"storage={tmp_path}"]
    nf4 = planned(table, chosen, [f"model.path={tiny_llama}", *toy])[1]
    gone = planned(table, chosen, [f"model.path={tmp_path / 'nowhere'}", *toy])[1]
    made = filled([gone, nf4], 0, "r", InProcessRuntime(threads=1), Silent())
    assert "nowhere" in made[0].refused
    assert made[1].refused == ""
    assert made[1].figures["Q.attack_success"][1] == 4
    assert "Q.exact_match" not in made[1].figures  # no benign prompt was asked
    text = page(table, [gone, nf4], made, chosen, "Made here.")
    assert "paper 23.9" in text
    assert "Not measured" in text
    assert filled([nf4], 0, "r", InProcessRuntime(threads=1), Silent()) == made[1:]


def test_rows_of_two_tables_share_their_q0() -> None:
    """Table 3 measures a control and Figure 1 does not: the quantize stage is one all the same."""
    whole = {arm.arm.title: arm.spec for arm in planned(paper_table("table3"), preset("embedded"))}
    for arm in planned(paper_table("figure1"), preset("embedded")):
        other = whole[arm.arm.title]
        assert arm.spec is not None
        assert other is not None
        assert (arm.spec.quantize, arm.spec.control) == (other.quantize, other.control)


def test_a_mistake_ends_the_command_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["reproduce", "table10", "--storage", str(tmp_path)]
    with pytest.raises(SystemExit) as left:
        main([*words, "--set", f"model.path={tmp_path / 'nowhere'}"])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "nowhere" in said
    assert "Traceback" not in said
    assert not (tmp_path / "reproduce").exists()


def test_the_command_writes_a_page_that_names_itself(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["reproduce", "table9", "--storage", str(tmp_path), "--json"]
    given = [f"model.path={tiny_llama}", "quantize={method: rtn}", *TOY]
    with pytest.raises(SystemExit) as left:
        main([*words, *(word for one in given for word in ("--set", one))])
    assert left.value.code == 0
    told = json.loads(capsys.readouterr().out)["table9"]
    assert len(told["rows"]) == 3
    page_text = Path(told["page"]).read_text()
    assert "qresafe reproduce table9 --preset embedded --seed 0 --set model.path=" in page_text
