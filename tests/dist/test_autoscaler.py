"""What is read out of an autoscaler's own report."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qresafe.dist import autoscaler, runtime
from qresafe.specs import ResourcesSpec

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


def test_a_demand_that_another_job_replaced_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster has room for one request: the other job, done waiting, sends an empty one."""
    standing: list[dict[str, float]] = []
    sleeps = 0

    def request(*, bundles: list[dict[str, float]]) -> None:
        standing[:] = bundles

    def other_job_ends(seconds: float) -> None:
        nonlocal sleeps
        sleeps += 1
        if sleeps == 1:
            request(bundles=[])

    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", request)
    monkeypatch.setattr(autoscaler, "ASK_SECONDS", 0)
    monkeypatch.setattr(autoscaler, "is_idle", lambda bundle, count: False)
    monkeypatch.setattr(runtime.time, "sleep", other_job_ends)
    monkeypatch.setattr(runtime, "count_places", lambda wanted: 2 if sleeps > 1 and standing else 0)
    wanted = ResourcesSpec(workers=2, cpus_per_worker=1, wait_seconds=1)
    runtime.wait_for(wanted, 2, patient=True)
    assert standing == []  # ours is taken back, too
