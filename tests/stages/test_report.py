"""The report: what it says, that it is self-contained, and that hostile text stays text."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from fabricated import REFUSAL, arm, row
from fabricated_experiment import DELIVERS, HOSTILE, fabricate

from qresafe.artifacts import Artifact, Run
from qresafe.progress import Silent
from qresafe.stages.compare import compare, read_comparison
from qresafe.stages.comparison import Comparison
from qresafe.stages.narrative import details, headline
from qresafe.stages.plots import Dot, Line, heat_plot, interval_plot, line_plot
from qresafe.stages.report import ReportInput, report


class Elements(HTMLParser):
    """Collects tags, their attributes and the text outside of style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, ReportInput]:
    run = Run(str(tmp_path_factory.mktemp("report")), "test")
    return run, fabricate(run)


@pytest.fixture(scope="module")
def made(given: tuple[Run, ReportInput]) -> Artifact:
    return report(*given, Silent())


@pytest.fixture(scope="module")
def page(made: Artifact) -> str:
    return (made.path / "report.html").read_text()


def test_the_page_loads_nothing(page: str) -> None:
    for tag, attributes in Elements(page).tags:
        assert tag not in {"script", "link", "iframe", "img", "object", "embed"}
        for name, value in attributes.items():
            assert name not in {"src", "srcset", "action"}
            assert not name.startswith("on")
            assert name not in {"href", "xlink:href"} or str(value).startswith("#")
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert "default-src 'none'" in page


def test_hostile_completions_stay_text(given: tuple[Run, ReportInput], page: str) -> None:
    assert "<script" not in page
    assert "onerror=" not in re.sub(r"&lt;.*?&gt;", "", page)
    # W refuses this prompt in a copy of the experiment, so that Q's hostile answer is shown.
    run, before = given
    rows = {
        label: [row("harmful", 0, HOSTILE if label == "Q" else REFUSAL)]
        for label in ("W", "Q0", "Q")
    }
    arms = {label: arm(run, label, made, prompts="hostile") for label, made in rows.items()}
    shown = dataclasses.replace(before, arms=arms, comparison=compare(run, arms, Silent()))
    text = (report(run, shown, Silent()).path / "report.html").read_text()
    assert html.escape(HOSTILE, quote=False).split("\u202e")[0].replace('"', "&#34;") in text
    assert not [tag for tag, _ in Elements(text).tags if tag in ("script", "img")]


def test_harmful_examples_are_folded(page: str) -> None:
    folded = [a for tag, a in Elements(page).tags if tag == "details"]
    assert any("open" in attributes for attributes in folded)
    for example in re.findall(r"<details( open)?>\s*<summary>harmful-", page):
        assert not example


def test_the_page_says_what_was_found(page: str, given: tuple[Run, ReportInput]) -> None:
    text = Elements(page).text
    found = read_comparison(given[1].comparison)
    for arm_result in found.arms:
        for share in arm_result.measures.values():
            assert f"{share.yes}/{share.n}" in text
    for heading in ("Prompt by prompt", "Flips and other", "Mask overlap", "Codes changed", "Cost"):
        assert heading in text
    for part in ("Compliance by category", "Over-refusal by category", "Compliance by language"):
        assert part in text
    assert "quantize.seed" in text
    assert "and 7,654 of 12,288 scales" in text
    assert given[1].comparison.key in text


def test_json_and_card_repeat_the_figures(made: Artifact) -> None:
    data = json.loads((made.path / "report.json").read_text())
    found = Comparison.model_validate(data["comparison"])
    assert data["verdict"][0] == headline(found)
    assert data["export"]["codes_changed"] > 0
    card = (made.path / "model_card.md").read_text()
    assert headline(found) in card
    assert "and 7654 of 12288 scales." in card
    table = [line for line in card.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1  # every row has the same columns
    assert len(table) == 2 + 8  # six measures, ROUGE-L, perplexity


def test_a_second_report_is_the_first(given: tuple[Run, ReportInput], made: Artifact) -> None:
    again = report(*given, Silent())
    assert again.reused
    assert again.key == made.key


def test_a_single_axis_and_foreign_labels_are_enough(tmp_path: Path) -> None:
    run = Run(str(tmp_path), "small")
    arms = {
        "mine": arm(run, "mine", [row("harmful", 0, DELIVERS)]),
        "theirs": arm(run, "theirs", [row("harmful", 0, REFUSAL)]),
    }
    done = report(run, ReportInput({}, compare(run, arms, Silent()), arms), Silent())
    text = (done.path / "report.html").read_text()
    assert "mine 100.0\u202f% (95 % interval 20.7–100.0)" in text


def verdict(tmp_path: Path, **answered: int) -> tuple[str, str]:
    """Return headline and details of 40 harmful prompts of which each arm answers a number."""
    run = Run(str(tmp_path), "verdict")
    arms = {
        label: arm(
            run, label, [row("harmful", i, DELIVERS if i < n else REFUSAL) for i in range(40)]
        )
        for label, n in answered.items()
    }
    found = read_comparison(compare(run, arms, Silent()))
    return headline(found), " ".join(details(found))


def test_headline_of_damage_and_repair(tmp_path: Path) -> None:
    said, more = verdict(tmp_path, W=0, Q0=30, Q=0)
    assert said == (
        "Quantization raised compliance with harmful prompts from 0.0\u202f% to 75.0\u202f%; "
        "the patch lowered it to 0.0\u202f%."
    )
    assert "the difference is not measurable (no prompt flipped; 40 would have shown" in more


def test_headline_claims_nothing_that_is_not_significant(tmp_path: Path) -> None:
    said, _ = verdict(tmp_path, W=0, Q0=3, Q=1)
    assert "raised" not in said
    assert "lowered" not in said
    assert "(3 prompts one way, 0 the other)" in said


def test_headline_of_a_patch_that_failed(tmp_path: Path) -> None:
    said, more = verdict(tmp_path, W=0, Q0=20, Q=38)
    assert "the patch raised it to 95.0" in said
    assert "Q is still above W" in more


def test_details_split_the_cause(tmp_path: Path) -> None:
    _, more = verdict(tmp_path, W=0, control=10, Q0=30, Q=0)
    assert "Of the +75.0 points between W and Q0, +25.0 come with the fine-tuning" in more
    assert "+50.0 with the low precision" in more


PLOTS = {
    "interval": lambda: interval_plot('a "b" & <c>', [Dot("W", "arm-W", 0.5, 0.25, 0.75)]),
    "line": lambda: line_plot("l", [Line("x", "ink", [1, 2], [2, 1])], "step"),
    "heat": lambda: heat_plot("h", ["q"], ["0", "1"], {(0, 0): 0.5, (0, 1): 0.0}),
}


@pytest.mark.parametrize("name", PLOTS)
def test_plots_take_their_colours_from_the_page(name: str) -> None:
    text = PLOTS[name]()
    ElementTree.fromstring(text.replace("xlink:href", "href"))  # well-formed
    assert not re.search(r"#[0-9a-fA-F]{6}\b(?![^<]*url)", text.replace("url(#", ""))
    assert "var(--" in text
    assert "<text" in text
    assert text == PLOTS[name]()  # the same bytes again
