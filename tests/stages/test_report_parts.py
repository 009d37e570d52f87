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
    AtK,
    AttackCell,
    AttackMeasure,
    AttackResult,
    Comparison,
    Contamination,
    JudgeAgreement,
    Share,
    Source,
)
from qresafe.stages.narrative import reached
from qresafe.stages.report import ReportInput, render, report, tell
from qresafe.stages.report_parts import (
    at_k,
    attacks,
    contamination,
    parts,
    sources,
    worst_cases,
)
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
    whole = {"worst_case": share(most, 40), "worst_case_by_framing": {"plain": share(most, 40)}}
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
    told["at_k"] = made.at_k(richer)
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


def leak(exact: int, near: int, kept: float) -> Contamination:
    found = {"calibration": 10, "evaluation": 5, "exact": exact, "near": near}
    return Contamination(**found, measure="likeness", threshold=0.8, highest_kept=kept)


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (leak(0, 0, 0.4567), "or more): none was dropped. The highest similarity among those kept"),
        (leak(0, 2, 0.75), "they were left out. The highest similarity among those kept is 0.75."),
    ],
)
def test_what_was_dropped_and_how_near_the_rest_is(
    given: tuple[Run, ReportInput], found: Contamination, told: str
) -> None:
    comparison = read_comparison(given[1].comparison)
    assert contamination(comparison) == ""
    assert told in contamination(comparison.model_copy(update={"contamination": found}))


def test_public_prompts_are_told_with_licence_and_citation(given: tuple[Run, ReportInput]) -> None:
    shown = tell(given[1])
    assert "<h3>Prompts</h3>" not in render(shown)["report.html"]
    source = Source(title="A set", licence="MIT & co", citation="Doe 2024", origin="x", repeats=3)
    shown["sources"] = sources(shown["comparison"].model_copy(update={"sources": {"set": source}}))
    page = render(shown)["report.html"].partition("<h2>Provenance</h2>")[2]
    for cell in ("set", "A set", "MIT &amp; co", "Doe 2024", "3"):
        assert f">{cell}</td>" in page


def test_a_heat_map_for_each_family(given: tuple[Run, ReportInput]) -> None:
    comparison = read_comparison(given[1].comparison)
    richer = comparison.model_copy(update={"attacks": [attacked("W", 9), attacked("Q0", 38)]})
    panels = attacks(richer)
    assert [panel.title for panel in panels] == [
        "compliance under temperature",
        "compliance under top-k",
    ]
    assert panels[0].svg.count(">95.0<") == 1  # 38 of 40
    assert worst_cases(richer) == [
        ("W", "plain", "temperature 1.0", "22.5\u202f%", "22.5\u202f%"),
        ("Q0", "plain", "temperature 1.0", "95.0\u202f%", "95.0\u202f%"),
    ]


def framed() -> AttackResult:
    """Two framings, two draws; under "top_k 50" nothing is decided."""
    low, high = wilson(0, 0)
    nothing = Share(yes=0, n=0, share=None, low=low, high=high, undecided=80)
    tries = [
        AtK(measure="compliance", k=k, n=40, share=s, low=s - 0.1, high=s + 0.1)
        for k, s in ((1, 0.5), (2, 0.75))
    ]
    cells = [
        AttackCell(framing="plain", configuration="top_k 1", share=share(8, 80)),
        AttackCell(framing="plain", configuration="top_k 50", share=nothing),
        AttackCell(framing="vanilla", configuration="top_k 1", share=share(40, 80), at_k=tries),
        AttackCell(framing="vanilla", configuration="top_k 50", share=nothing),
    ]
    measure = AttackMeasure(
        measure="compliance",
        worst_case=share(32, 40),
        worst_case_by_framing={"plain": share(6, 40), "vanilla": share(30, 40)},
        cells=cells,
    )
    return AttackResult(
        label="Q0",
        judges={"main": "refusal"},
        prompts=40,
        samples=2,
        framings=["plain", "vanilla"],
        configurations=["top_k 1", "top_k 50"],
        measures=[measure],
    )


def test_undecided_prompts_make_a_worst_case_a_range() -> None:
    """20 of 100 gave way and 39 might have: 20 to 59, and not the 33 of the 61 that are decided."""
    low, high = wilson(20, 61)
    found = Share(yes=20, n=61, share=20 / 61, low=low, high=high, undecided=39)
    assert reached(found) == "20.0 to 59.0\u202f%"
    assert reached(share(20, 100)) == "20.0\u202f%"


def test_framings_and_tries_of_an_attack(given: tuple[Run, ReportInput]) -> None:
    comparison = read_comparison(given[1].comparison).model_copy(update={"attacks": [framed()]})
    assert worst_cases(comparison) == [
        ("Q0", "any", "vanilla, top_k 1", "50.0\u202f%", "80.0\u202f%"),
        ("Q0", "plain", "top_k 1", "10.0\u202f%", "15.0\u202f%"),
        ("Q0", "vanilla", "top_k 1", "50.0\u202f%", "75.0\u202f%"),
    ]
    where = "compliance under top_k 1, vanilla"
    assert at_k(comparison) == [
        ("Q0", where, 1, 40, "50.0\u202f%", "40.0–60.0"),
        ("Q0", where, 2, 40, "75.0\u202f%", "65.0–85.0"),
    ]
    page = shown(given[1], attacks=[framed()])
    assert "With k tries" in page
    assert "65.0–85.0" in page


def test_an_undecided_cell_is_left_out_of_the_heat_map(given: tuple[Run, ReportInput]) -> None:
    comparison = read_comparison(given[1].comparison).model_copy(update={"attacks": [framed()]})
    (panel,) = attacks(comparison)
    assert (panel.svg.count(">10.0<"), panel.svg.count(">50.0<")) == (1, 1)
    assert ">0.0<" not in panel.svg


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
