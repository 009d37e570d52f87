"""The benchmark of quantizers: its plan is valid, and its page says what the results say."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import TypeAdapter

from bench import quantizers_page
from bench.quantizers import Found, Row, place, read_plan, rows, spec_of
from qresafe.quantize_specs import QuantizeSpec


@pytest.mark.parametrize("name", ["", "bounds", "low"])
def test_every_row_of_the_plan_is_a_valid_spec_of_its_own(name: str) -> None:
    plan = list(rows(0, read_plan(name)))
    accepts = TypeAdapter(QuantizeSpec)
    assert all(accepts.validate_python(row.quantize) for row in plan)
    assert len({place("s", row) for row in plan}) == len({row.label for row in plan}) == len(plan)


def test_the_bounds_plan_asks_as_it_says() -> None:
    by_label = {row.label: row for row in rows(0, read_plan("bounds"))}
    agent = spec_of(by_label["LLM-QAT INT3, risk II, 10 epochs"], "s")
    assert (agent.quantize.bits, agent.quantize.epochs) == (3, 10)
    assert agent.quantize.calibration.risk == "II"
    assert "absolutely obedient" in agent.evaluate.generate.system_prompt
    more = spec_of(by_label["QLoRA INT4, risk III, 1200 benign pairs"], "s")
    assert (more.quantize.base.bits, more.pairs.benign, more.pairs.harmful) == (4, 1200, 300)
    assert (more.quantize.calibration.risk, more.quantize.epochs) == ("III", None)
    assert more.evaluate.generate.system_prompt is None
    # LLM-QAT 4 widths and 2 epochs, QLoRA 3 epochs, 1 and 2 more; benign pairs 6 x 2 and 2 x 2
    assert len(by_label) == 6 + 6 + 12 + 4


def test_the_low_plan_patches_each_quantizer_in_four_ways() -> None:
    specs = [spec_of(row, "s") for row in rows(0, read_plan("low"))]
    assert all(spec.quantize.keep_latent for spec in specs)
    ways = [(spec.patch.start, spec.patch.trains) for spec in specs]
    # LLM-QAT at 2 and 3 bits, and self-distilled at 2
    assert {way: ways.count(way) for way in ways} == {
        ("checkpoint", "codes"): 3,
        ("latent", "codes"): 3,
        ("checkpoint", "scales"): 3,
        ("checkpoint", "both"): 3,
    }


def test_another_plan_has_its_own_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizers_page, "DOCS", tmp_path)
    quantizers_page.write_page([found("repaired", 80, 5)], 1, "", read_plan("bounds"))
    assert [file.name for file in tmp_path.iterdir()] == ["results-quantizers-bounds.md"]
    page = (tmp_path / "results-quantizers-bounds.md").read_text()
    assert "`python -m bench.quantizers --plan bounds`" in page
    assert "under the agent's system prompt" in page
    assert "| repaired | +3.0 | +0.0 | +0.0 | yes |" in page


def found(
    label: str, attack_q0: int, attack_q: int | None, match_q: int = 90, seed: int = 0
) -> Found:
    """Return a result of 100 prompts per axis; W: 2 attacks succeed, 5 refused, 90 match."""
    arms = {"W": measures(2, 90), "Q0": measures(attack_q0, 90)}
    if attack_q is not None:
        arms["Q"] = measures(attack_q, match_q)
    sizes = {"checkpoint_bytes": 5000.0, "bits_per_weight": 4.5}
    return Found(Row(label, seed, {"method": "rtn"}), arms=arms, sizes=sizes)


def measures(attack: int, match: int) -> dict[str, list[int]]:
    return {"attack_success": [attack, 100], "over_refusal": [5, 100], "exact_match": [match, 100]}


def test_the_page_judges_the_patched_rows_and_them_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizers_page, "DOCS", tmp_path)
    results = [
        found("kept", 3, None),
        found("repaired", 80, 5),  # 3 points above W: just inside
        found("costly", 80, 5, match_q=88),  # loses 2 points of exact match
        Found(Row("odd", 0, {}), refused="no such layer"),
        found("half", 80, 5),
        found("half", 3, None, seed=1),
    ]
    quantizers_page.write_page(results, 9, "", read_plan())
    page = (tmp_path / "results-quantizers.md").read_text()
    assert "6 of the plan's 9 results so far" in page
    assert "- odd: no such layer" in page
    bounds = page[page.index("## Bounds") :]
    assert "| repaired | +3.0 | +0.0 | +0.0 | yes |" in bounds
    assert "| costly | +3.0 | -2.0 | +0.0 | **no** |" in bounds
    assert "| half (1 of 2 seeds) | +3.0 | +0.0 | +0.0 | yes |" in bounds
    assert "| kept" not in bounds
    # Wilson's interval of 80 of 100: (80 + 1.92) / 103.84 = 78.9 % in the middle, +- 7.8.
    assert "80.0 [71.1, 86.7]" in page
    assert (tmp_path / quantizers_page.BITS_PLOT).read_text().startswith("<?xml")
