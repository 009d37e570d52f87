"""What is read out of an autoscaler's own report."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qresafe.dist import autoscaler

WANTED = {"CPU": 1.0, "GPU": 8.0}


def report(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    said = {"pending_launches": {}, "pending_nodes": [], "active_nodes": {"head": 1}}
    demand = changes.pop("demand", [[WANTED, 2]])
    status = {
        "autoscaler_report": said | changes,
        "load_metrics_report": {"request_demand": demand},
    }
    _says(monkeypatch, json.dumps(status).encode())


def _says(monkeypatch: pytest.MonkeyPatch, text: bytes | None) -> None:
    monkeypatch.setattr(autoscaler, "_internal_kv_get", lambda key: text)


def test_nothing_coming_for_a_demand_that_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    report(monkeypatch)
    assert autoscaler.is_idle(WANTED, 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"demand": []},
        {"demand": [[{"CPU": 1.0}, 2]]},
        {"demand": [[WANTED, 3]]},
        {"pending_launches": {"gpu": 1}},
        {"pending_nodes": [["10.0.0.2", "gpu", "setting-up"]]},
        {"active_nodes": {"head": 1, "cpu": 1}},
    ],
)
def test_it_may_still_come(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    report(monkeypatch, **changes)
    assert not autoscaler.is_idle(WANTED, 2)


def test_nobody_says_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in (None, b"{}", json.dumps({"load_metrics_report": {}}).encode()):
        _says(monkeypatch, text)
        assert not autoscaler.is_idle(WANTED, 2)
