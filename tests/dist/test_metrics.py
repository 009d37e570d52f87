"""Figures for Prometheus: the docs and the dashboard name them all, and nothing else.

That Ray exports them is seen where jobs run on Ray anyway: `test_data.py`, `test_train.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from scraping import exported
from upath import UPath

from qresafe import metrics
from qresafe.metrics import METRICS

ROOT = Path(__file__).parents[2]
NAME = re.compile(r"\bray_qresafe_\w+")


def dashboard() -> set[str]:
    """Return all of our names in the dashboard's queries."""
    board = json.loads((ROOT / "ops" / "grafana.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries += [str(variable["query"]) for variable in board["templating"]["list"]]
    return {name for query in queries for name in NAME.findall(query)}


def test_the_docs_name_every_metric_with_its_kind_and_labels() -> None:
    told = (ROOT / "docs" / "operations.md").read_text()
    for name, metric in METRICS.items():
        labels = ", ".join(metric.labels)
        assert f"| `{exported(name)}` | {metric.kind} | {labels} | {metric.meaning} |" in told, name
    assert set(NAME.findall(told)) == {exported(name) for name in METRICS}


def test_the_dashboard_shows_every_metric() -> None:
    assert dashboard() == {exported(name) for name in METRICS}


@pytest.mark.parametrize("folder", ["/x/runs/a/patch/k", "memory://b/runs/a/patch/k/work/parts"])
def test_a_folder_tells_run_and_stage(folder: str) -> None:
    assert metrics.place(UPath(folder)) == {"run": "a", "stage": "patch"}
    assert metrics.place(UPath("/tmp/parts")) == {"run": "", "stage": ""}


def test_without_a_session_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(metrics, "_sink", [])  # an engine of another test may have left one
    assert not metrics.recording()
    metrics.record("qresafe_rows", 1, {})
    metrics.send_to(lambda name, value, labels: seen.append(name))
    metrics.record("qresafe_rows", 1, {})
    metrics.send_to(None)
    metrics.record("qresafe_rows", 1, {})
    assert seen == ["qresafe_rows"]


def test_a_figure_that_cannot_be_handed_on_is_no_error() -> None:
    seen: list[str] = []

    def broken(name: str, value: float, labels: Mapping[str, str]) -> None:
        seen.append(name)
        raise RuntimeError("no agent")

    metrics.send_to(broken)
    metrics.record("qresafe_rows", 1, {})
    metrics.send_to(None)
    assert seen == ["qresafe_rows"]
