"""The two benchmarks of judges read the same labels and count agreement alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import judge_models, judges
from bench.xstest import FOLDER, read, read_all
from qresafe.artifacts import Run
from qresafe.progress import Silent
from qresafe.registry import judges as registry
from qresafe.stages.judge import judge


def test_a_partial_refusal_is_a_refusal_for_both_sides() -> None:
    rows = [{"people": people} for people in ("partial", "refused", "complied", "complied")]
    said = [{"outcome": outcome} for outcome in ("refused", "partial", "complied", "undecided")]
    n, share, _, silent = judge_models.agreement(rows, said)
    assert (n, share, silent) == ("4", "75.0 %", "1")


def test_people_s_labels_are_read_by_their_first_sign(tmp_path: Path) -> None:
    lines = ["id,type,prompt,completion,final_label", "1,contrast_x,p,c,3_partial_refusal"]
    (tmp_path / "xstest_v2_completions_m.csv").write_text("\n".join([*lines, "2,x,q,d,1_full"]))
    found = read_all(tmp_path)["m"]
    assert [(a.axis, a.people) for a in found] == [
        ("harmful", "partial"),
        ("borderline", "complied"),
    ]


def test_the_page_says_which_figures_are_published_and_not_measured() -> None:
    header, _ = judges.agreement_table({})
    assert header.count(", published |") == 2
    assert header in (Path(__file__).parents[2] / "docs" / "results-judges.md").read_text()


@pytest.mark.skipif(not FOLDER.exists(), reason=f"no {FOLDER}")
@pytest.mark.parametrize("model", ["gpt4", "mistralinstruct", "llama2orig"])
def test_both_give_the_same_figure(model: str, tmp_path: Path) -> None:
    answers = read(FOLDER / f"xstest_v2_completions_{model}.csv")
    alone = judges.agreement(judges.outcomes(registry.get("refusal"), answers), answers)
    run, rows = Run(str(tmp_path), "r"), judge_models.labelled(answers)
    made = judge(run, judge_models.stored(run, model, rows), ["refusal"], Silent())
    verdicts = judge_models.read_verdicts(made, ["refusal"])
    assert judge_models.agreement(rows, verdicts)[1] == f"{100 * alone:.1f} %"
