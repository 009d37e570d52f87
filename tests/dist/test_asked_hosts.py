"""What is asked of other hosts and made of their answers; tests/cluster asks hosts for real."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from upath import UPath

from qresafe.dist import hosts
from qresafe.errors import ResourceError


class Other:
    """Another host: it answers what `sees` says of each path, or not at all."""

    def __init__(self, sees: bool | None) -> None:
        self.sees, self.asked = sees, list[UPath]()

    def remote(self, paths: list[UPath]) -> Other:
        assert all(path.exists() for path in paths)
        self.asked = paths
        return self


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Other:
    made = Other(request.param)
    here = SimpleNamespace(get_node_id=lambda: "here")
    nodes = [
        {"NodeID": name, "NodeManagerAddress": f"10.0.0.{i}", "Alive": True}
        for i, name in enumerate(("here", "there"))
    ]

    def wait(asked: list[Other], **_: Any) -> tuple[list[Other], list[Other]]:
        return (asked, []) if made.sees is not None else ([], asked)

    def get(answer: Other) -> tuple[str, list[str]]:
        return "there (10.0.0.1)", [] if answer.sees else [str(path) for path in answer.asked]

    monkeypatch.setattr(hosts.ray, "get_runtime_context", lambda: here)
    monkeypatch.setattr(hosts.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(hosts.ray, "wait", wait)
    monkeypatch.setattr(hosts.ray, "get", get)
    monkeypatch.setattr(hosts, "_on", {"there": made}.__getitem__)
    return made


@pytest.fixture
def storage() -> UPath:
    return UPath(f"memory://hosts-{time.monotonic_ns()}/runs/a")


@pytest.mark.parametrize("other", [False], indirect=True)
def test_a_host_that_does_not_see_a_bucket_is_named(other: Other, storage: UPath) -> None:
    said = r"host there \(10.0.0.1\) does not see .+ in memory://hosts-.+ every host its keys"
    with pytest.raises(ResourceError, match=said):
        hosts.check_hosts(storage, [])
    assert list(storage.iterdir()) == []


@pytest.mark.parametrize("other", [True], indirect=True)
def test_every_host_is_asked_for_the_probe_and_the_models(
    other: Other, storage: UPath, tmp_path: Path
) -> None:
    hosts.check_hosts(storage, [tmp_path])
    model, probe = other.asked
    assert (str(model), probe.parent) == (str(tmp_path), storage)
    assert list(storage.iterdir()) == []


@pytest.mark.parametrize("other", [None], indirect=True)
def test_a_host_that_does_not_answer_is_named(
    other: Other, storage: UPath, caplog: pytest.LogCaptureFixture
) -> None:
    hosts.check_hosts(storage, [])
    assert "did not answer in 120 s: 10.0.0.1" in caplog.text


def test_a_path_that_cannot_be_looked_at_is_not_seen(
    storage: UPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("unable to locate credentials")

    monkeypatch.setattr(hosts.ray.util, "get_node_ip_address", lambda: "10.0.0.1")
    storage.mkdir(parents=True)
    assert hosts._missing([storage])[1] == []
    monkeypatch.setattr(type(storage.fs), "exists", refuse)
    monkeypatch.setattr(type(storage.fs), "info", refuse)
    assert hosts._missing([storage])[1] == [str(storage)]
