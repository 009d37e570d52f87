"""What a report shows only where it was measured, and the published shape of report.json."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from fabricated import REFUSAL, arm, row
from fabricated_experiment import DELIVERS, fabricate

from qresafe.artifacts import Run
from qresafe.progress import Silent
from qresafe.stages.compare import compare, read_comparison
from qresafe.stages.comparison import (
    AttackCell,
    AttackMeasure,
    AttackResult,
    Comparison,
    Contamination,
    JudgeAgreement,
    Share,
)
from qresafe.stages.report import ReportInput, render, report, tell
from qresafe.stages.report_parts import at_k, attacks, parts, worst_cases
from qresafe.stages.statistics import wilson

DOCS = Path(__file__).parents[2] / "docs"


def share(yes: int, n: int) -> Share:
    low, high = wilson(yes, n)
    return Share(yes=yes, n=n, share=yes / n, low=low, high=high)


def attacked(label: str, most: int) -> AttackResult:
    settings = {"temperature": ("0.05", "0.5", "1.0"), "top_k": ("1", "50")}
    cells = [
        AttackCell(
            framing="plain", configuration=f"{family} {value}", share=share(most - place, 40)
        )
        for family, values in settings.items()
        for place, value in enumerate(reversed(values))
    ]
    whole = {"worst_case": share(most, 40), "worst_case_by_framing": {}}
    return AttackResult(
        label=label,
        judges={"main": "refusal"},
        prompts=40,
        samples=1,
        framings=["plain"],
        configurations=[cell.configuration for cell in cells],
        measures=[AttackMeasure(measure="compliance", cells=cells, **whole)],
    )


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, ReportInput]:
    run = Run(str(tmp_path_factory.mktemp("parts")), "test")
    return run, fabricate(run, 12)


def shown(given: ReportInput, **more: object) -> str:
    """Return the page of the comparison with `more` in it, as colleagues' stages put it there."""
    told = tell(given)
    richer: Comparison = told["comparison"].model_copy(update=more)
    from qresafe.stages import report_parts as made
    from qresafe.stages import report_view

    told |= {"attacks": made.attacks(richer), "worst_cases": made.worst_cases(richer)}
    told |= {
        "agreement": report_view.agreement(richer),
        "contamination": made.contamination(richer),
    }
    return render(told)["report.html"]


def test_attacks_judges_and_leaks_are_shown_where_they_are(given: tuple[Run, ReportInput]) -> None:
    plain = shown(given[1])
    assert "Under attack" not in plain
    assert "Cohen" in plain  # two judges
    page = shown(
        given[1],
        attacks=[attacked("W", 9), attacked("Q0", 38)],
        agreement=[
            JudgeAgreement(arm="W", first="keyword", second="refusal", n=40, same=36, kappa=0.72)
        ],
        contamination=Contamination(
            calibration=1700,
            evaluation=1000,
            exact=0,
            near=3,
            measure="likeness",
            threshold=0.8,
            highest_kept=0.5,
        ),
    )
    assert "Under attack" in page
    assert "Compliance under temperature" in page or "compliance under temperature" in page
    assert "temperature 1.0</td><td>95.0" in page.replace("\n", "")
    assert "0.72" in page
    assert "3 nearly are (likeness of 0.8 or more): they were left out" in page


def test_a_heat_map_for_each_family(given: tuple[Run, ReportInput]) -> None:
    comparison = read_comparison(given[1].comparison)
    richer = comparison.model_copy(update={"attacks": [attacked("W", 9), attacked("Q0", 38)]})
    panels = attacks(richer)
    assert [panel.title for panel in panels] == [
        "compliance under temperature",
        "compliance under top-k",
    ]
    assert panels[0].svg.count(">95.0<") == 1  # 38 of 40
    assert worst_cases(richer)[1] == ("Q0", "temperature 1.0", "95.0\u202f%", "95.0\u202f%")


def test_parts_are_split_and_small_ones_are_grey(given: tuple[Run, ReportInput]) -> None:
    found = {part.title: part for part in parts(read_comparison(given[1].comparison))}
    assert "Attack success by category" not in found  # compliance says it better
    kinds = found["Compliance by category"]
    assert [(one.name, one.n, one.few) for one in kinds.rows] == [
        (f"kind {i}", "4", True) for i in range(3)
    ]
    languages = [(one.name, one.n) for one in found["Compliance by language"].rows]
    assert languages == [("de", "6"), ("en", "6")]


def test_asr_at_k(tmp_path: Path) -> None:
    # Two prompts in four samples: one is answered twice, one never.
    # k = 1: (1/2 + 0) / 2; k = 2: (1 - C(2,2)/C(4,2) + 0) / 2 = 5/12.
    rows = [row("harmful", 0, DELIVERS if s < 2 else REFUSAL, sample=s) for s in range(4)]
    rows += [row("harmful", 1, REFUSAL, sample=s) for s in range(4)]
    run = Run(str(tmp_path), "k")
    found = read_comparison(compare(run, {"W": arm(run, "W", rows)}, Silent()))
    assert found.cluster == "prompt"
    assert found.samples == 4
    answered = [one for one in found.arms[0].at_k if one.measure == "compliance"]
    assert [(one.k, one.n, pytest.approx(one.share)) for one in answered] == [
        (1, 2, 1 / 4),
        (2, 2, 5 / 12),
    ]
    measured = found.arms[0].measures["compliance"]
    assert (measured.n, measured.clusters) == (8, 2)
    assert measured.cluster_high is not None
    assert measured.cluster_high > measured.high
    assert len(at_k(found)) == 4


def test_the_published_schema_is_current() -> None:
    command = [sys.executable, str(DOCS / "report_schema.py"), "--check"]
    assert subprocess.run(command).returncode == 0, "run python docs/report_schema.py"


def test_a_real_report_is_valid(given: tuple[Run, ReportInput]) -> None:
    made = report(*given, Silent())
    data = json.loads((made.path / "report.json").read_text())
    schema = json.loads((DOCS / "report.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(data, schema, jsonschema.Draft202012Validator)
    data["comparison"]["arms"][0]["measures"]["compliance"]["yes"] = "many"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, schema, jsonschema.Draft202012Validator)
