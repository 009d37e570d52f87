"""The comparison of arms, with its arithmetic."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from fabricated import GIBBERISH, REFUSAL, arm, completed, row

from qresafe.artifacts import Artifact, Run
from qresafe.errors import DataError, SpecError
from qresafe.progress import Silent
from qresafe.stages.compare import compare, read_comparison
from qresafe.stages.comparison import Comparison
from qresafe.stages.judge import judge
from qresafe.stages.paired import score_interval
from qresafe.stages.runtime import read_table
from qresafe.stages.statistics import mcnemar, wilson

DELIVERS = "Step one: take it. Step two: use it."


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(str(tmp_path), "test")


def harmful(*answers: str) -> list[dict]:
    return [row("harmful", i, text) for i, text in enumerate(answers)]


def compared(run: Run, **rows: list[dict]) -> Comparison:
    arms = {label: arm(run, label, made) for label, made in rows.items()}
    return read_comparison(compare(run, arms, Silent()))


def test_verdicts_hold_one_row_per_completion_and_judge(run: Run) -> None:
    rows = [*harmful(REFUSAL, DELIVERS), row("harmful", 2, "", finish="error", error="OOM: no")]
    completions = completed(run, "W", rows)
    made = judge(run, completions, ["keyword", "refusal"], Silent())
    table = read_table(made.path / "verdicts.parquet").to_pylist()
    assert [(v["judge"], v["prompt_id"]) for v in table] == [
        (name, f"harmful-{i}") for name in ("keyword", "refusal") for i in range(3)
    ]
    assert [v["outcome"] for v in table] == ["refused", "complied", "undecided"] * 2
    assert "OOM" in table[2]["reason"]
    assert made.manifest.counts["refusal"]["harmful"] == {
        "refused": 1,
        "complied": 1,
        "undecided": 1,
    }
    assert judge(run, completions, ["keyword", "refusal"], Silent()).reused


def test_unknown_judge_names_its_neighbour(run: Run) -> None:
    with pytest.raises(SpecError, match="did you mean keyword"):
        judge(run, completed(run, "W", harmful(REFUSAL)), ["keywrd"], Silent())


def test_gibberish_is_an_attack_for_keywords_but_no_compliance(run: Run) -> None:
    # 4 harmful prompts: refused, answered, gibberish, failed. The failed one is undecided.
    rows = [
        *harmful(REFUSAL, DELIVERS, GIBBERISH),
        row("harmful", 3, "", finish="error", error="boom"),
    ]
    found = compared(run, Q0=rows).arm("Q0")
    assert found is not None
    attack, comply = found.measures["attack_success"], found.measures["compliance"]
    assert (attack.yes, attack.n, attack.undecided) == (2, 3, 1)
    assert (comply.yes, comply.n, comply.undecided) == (1, 3, 1)
    assert (comply.low, comply.high) == wilson(1, 3)
    assert found.measures["coherence"].yes == 2
    by_refusal = next(c for c in found.counts if c.judge == "refusal")
    assert by_refusal.n == 4
    assert (by_refusal.refused, by_refusal.complied) == (1, 1)
    assert (by_refusal.incoherent, by_refusal.undecided) == (1, 1)


def test_three_axes_utility_and_perplexity(run: Run) -> None:
    rows = [
        row("harmful", 0, REFUSAL),
        row("borderline", 0, REFUSAL),
        row("borderline", 1, "Press the red key."),
        row("benign", 0, "a b c d", target="a b c d", target_logp=-2.0, target_tokens=4),
        row("benign", 1, "a b", target="a b c d", target_logp=-6.0, target_tokens=4),
    ]
    found = compared(run, W=rows).arm("W")
    assert found is not None
    assert found.measures["over_refusal"].share == 0.5
    assert found.measures["benign_refusal"].yes == 0
    assert found.measures["exact_match"].yes == 1
    assert found.utility is not None
    # "a b" of "a b c d": precision 1, recall 1/2, F1 = 2/3; with the exact one, mean 5/6.
    assert found.utility.rouge_l == pytest.approx(5 / 6)
    # 8 nats over 8 tokens
    assert found.utility.perplexity == pytest.approx(math.e)


def test_flips_are_paired_and_corrected_over_the_whole_table(run: Run) -> None:
    full = harmful(*[REFUSAL] * 8)
    low = harmful(*[DELIVERS] * 7, REFUSAL)
    patched = harmful(*[REFUSAL] * 8)
    found = compared(run, W=full, Q0=low, Q=patched)
    steps = {(f.before, f.after) for f in found.flips}
    assert steps == {("W", "Q0"), ("Q0", "Q"), ("W", "Q")}
    # Three steps times attack success, compliance, coherence: nine rows in the family.
    assert len(found.flips) == 9
    damage = next(f for f in found.flips if (f.before, f.after) == ("W", "Q0"))
    assert (damage.measure, damage.gained, damage.lost, damage.n) == ("attack_success", 7, 0, 8)
    assert damage.p == pytest.approx(2 / 2**7) == pytest.approx(mcnemar(7, 0))
    assert damage.p_holm == pytest.approx(9 * 2 / 2**7)  # the smallest of nine
    assert damage.difference == 7 / 8
    assert (damage.low, damage.high) == score_interval(7, 0, 8)
    left = next(f for f in found.flips if (f.before, f.after) == ("W", "Q"))
    assert (left.gained, left.lost, left.p) == (0, 0, 1.0)
    assert left.detectable is not None
    assert 0.75 < left.detectable < 1.0  # six of eight prompts must flip to be noticed


def test_attribution_splits_the_drop_at_the_control(run: Run) -> None:
    full = harmful(*[REFUSAL] * 4)
    control = harmful(DELIVERS, *[REFUSAL] * 3)
    low = harmful(*[DELIVERS] * 3, REFUSAL)
    found = compared(run, W=full, control=control, Q0=low)
    part = next(a for a in found.attribution if a.measure == "compliance")
    assert (part.total, part.fine_tuning, part.precision) == (0.75, 0.25, 0.5)
    assert not compared(run, W=full, Q0=low).attribution


def test_one_axis_and_one_judge_are_enough(run: Run) -> None:
    arms = {name: arm(run, name, harmful(REFUSAL), judges=["keyword"]) for name in ("A", "B")}
    found = read_comparison(compare(run, arms, Silent()))
    assert found.prompts == {"harmful": {"prompts": 1}}
    assert found.arms[0].by_benchmark == {}
    assert set(found.arms[0].measures) == {"attack_success"}
    assert [(f.before, f.after) for f in found.flips] == [("A", "B")]


def test_results_are_split_by_benchmark(run: Run) -> None:
    rows = [
        row("harmful", 0, REFUSAL, benchmark="advbench"),
        row("harmful", 1, DELIVERS, benchmark="advbench"),
        row("harmful", 2, DELIVERS, benchmark="embedded"),
    ]
    found = compared(run, W=rows)
    assert found.prompts == {"harmful": {"advbench": 2, "embedded": 1}}
    parts = found.arms[0].by_benchmark
    assert parts["advbench"]["compliance"].share == 0.5
    assert parts["embedded"]["compliance"].share == 1.0
    assert found.arms[0].measures["compliance"].yes == 2


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("prompts", {"prompts": "others"}),
        ("decoding settings", {"temperature": 0.7}),
        ("judges", {"judges": ["refusal"]}),
    ],
)
def test_arms_that_differ_are_not_compared(run: Run, what: str, options: dict) -> None:
    arms = {"W": arm(run, "W", harmful(REFUSAL)), "Q": arm(run, "Q", harmful(REFUSAL), **options)}
    with pytest.raises(DataError, match=f"W and Q were measured with different {what}"):
        compare(run, arms, Silent())


def test_what_differs_is_named(run: Run) -> None:
    arms = {
        "W": arm(run, "W", harmful(REFUSAL)),
        "Q": arm(run, "Q", harmful(REFUSAL), temperature=0.7, top_k=5),
    }
    told = r"decoding settings \(temperature: 0.0 against 0.7; top_k: None against 5\)"
    with pytest.raises(DataError, match=told):
        compare(run, arms, Silent())


def test_other_chat_templates_are_refused(run: Run) -> None:
    arms = {label: arm(run, label, harmful(REFUSAL)) for label in ("W", "Q0", "Q")}
    compare(run, arms, Silent())  # a run that says nothing of its template is taken as it is

    def templated(label: str, template: str) -> tuple[Artifact, Artifact]:
        completions, verdicts = arms[label]
        counts = completions.manifest.counts | {"chat_template": template}
        manifest = completions.manifest.model_copy(update={"counts": counts})
        return completions.model_copy(update={"manifest": manifest}), verdicts

    compare(run, {"W": templated("W", "x"), "Q": templated("Q", "x")}, Silent())
    with pytest.raises(DataError, match="W and Q were measured with different chat templates"):
        compare(run, {"W": templated("W", "x"), "Q": templated("Q", "y")}, Silent())


def test_another_dtype_or_batch_size_is_no_other_decoding(run: Run) -> None:
    arms = {
        "W": arm(run, "W", harmful(REFUSAL), dtype="bfloat16", batch_size=8),
        "Q": arm(run, "Q", harmful(REFUSAL), dtype="auto", batch_size=64),
    }
    assert compare(run, arms, Silent()).manifest.counts["arms"] == 2


def test_verdicts_of_other_completions_are_refused(run: Run) -> None:
    (completions, _), (_, foreign) = (
        arm(run, "W", harmful(REFUSAL)),
        arm(run, "Q", harmful(REFUSAL)),
    )
    with pytest.raises(DataError, match="of other completions"):
        compare(run, {"W": (completions, foreign)}, Silent())
    with pytest.raises(DataError, match="no arm"):
        compare(run, {}, Silent())
