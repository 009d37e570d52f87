"""Hostile prompts, categories, names and specs: text in a report, and nothing but text."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from fabricated import REFUSAL, arm, row
from fabricated_experiment import fabricate
from test_report import Elements

from qresafe.artifacts import Run
from qresafe.progress import Silent
from qresafe.redaction import HIDDEN
from qresafe.stages.compare import compare
from qresafe.stages.report import report

KEY = "correct horse battery staple " * 4  # long enough to be folded by YAML
HOSTILE = [
    "</script><script>planted(1)</script>",
    "'\"><img src=x onerror=planted(2)>",
    "</style></title></pre><svg onload=planted(3)>",
    "javascript:planted(4)",
    "[x](javascript:planted(5))",
    "{{ 7 * 191 }}{% for x in y %}",
    "<!--",
    "$\\frac{planted}{$",
    "\x00\x1b[31m\u202e]]>&#60;script>",
]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of a report in which everything that a user or a model names is hostile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOME_SECRET", KEY)
        run = Run(str(tmp_path_factory.mktemp("hostile")), "test")
        arms = {
            label: arm(run, label, rows(label), prompts="hostile") for label in ("W", "Q0", "Q")
        }
        plain = fabricate(run, 4)
        spec = dict(plain.spec) | {"model": {"path": HOSTILE[0], "note": f"see {KEY}"}}
        made = compare(run, arms, Silent())
        given = dataclasses.replace(plain, spec=spec, arms=arms, comparison=made)
        folder = Path(str(report(run, given, Silent()).path))
    return {file.name: file.read_text() for file in folder.iterdir()}


def rows(label: str) -> list[dict[str, object]]:
    """Return answers of which every text is hostile; W refuses what the others answer."""
    made = []
    for i, text in enumerate(HOSTILE):
        said = REFUSAL if label == "W" else f"Step one: {text}"
        parts = {"benchmark": f"b{i}{text}", "category": text, "lang": "en"}
        made.append(row("harmful", i, said, **parts) | {"prompt": text})
    return made


def test_the_page_holds_no_element_of_theirs(pages: dict[str, str]) -> None:
    page = Elements(pages["report.html"])
    assert not [tag for tag, _ in page.tags if tag in {"script", "img", "iframe", "object"}]
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert "javascript:" not in (value or "")
    assert "planted(1)" in page.text, "it is shown, as text"
    assert "1337" not in page.text.replace("{{ 7 * 191 }}", ""), "7 * 191 = 1337 is not computed"
    assert "default-src 'none'" in pages["report.html"]


def test_the_model_card_holds_none_either(pages: dict[str, str]) -> None:
    card = pages["model_card.md"]
    assert "planted(1)" in card
    assert not re.search(r"<[a-z/!]", card), "a tag"
    assert not re.search(r"(?<!\\)\[[^\]\n]*\]\(", card), "a link"


def test_the_figures_are_json(pages: dict[str, str]) -> None:
    assert json.loads(pages["report.json"])["spec"]["model"]["path"] == HOSTILE[0]


@pytest.mark.parametrize("name", ["report.html", "report.json"])
def test_the_specs_secrets_are_hidden(pages: dict[str, str], name: str) -> None:
    assert "horse" not in pages[name]
    assert f"see {HIDDEN}" in pages[name]
