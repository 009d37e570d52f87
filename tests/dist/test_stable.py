"""Which engine a borrower gets, without Ray: nodes and engines are names."""

from __future__ import annotations

from typing import Any

import pytest

from qresafe.dist import engines
from qresafe.dist.engines import Stable


@pytest.fixture
def stable(monkeypatch: pytest.MonkeyPatch) -> Stable:
    started: list[str] = []

    def start(self: Stable, node: str, gpus: str) -> str:
        started.append(node)
        return f"engine {len(started)} on {node}"

    monkeypatch.setattr(Stable, "_start", start)
    return Stable(threads=1, most=2)


def test_a_borrower_that_asks_again_gets_its_engine(stable: Stable) -> None:
    assert stable.lend("a", "n1", "") == "engine 1 on n1"
    assert stable.lend("a", "n1", "") == "engine 1 on n1"


def test_a_borrower_that_comes_again_from_another_node_gets_one_there(stable: Stable) -> None:
    # Ray restarts an actor under its old name, on a new node where the old one was lost.
    assert stable.lend("a", "n1", "") == "engine 1 on n1"
    assert stable.lend("a", "n2", "") == "engine 2 on n2"


class Idle:
    """An engine of which only `rest.remote` is called."""

    def __init__(self, node: str, called: list[str]) -> None:
        self.rest, self._node, self._called = self, node, called

    def remote(self) -> str:
        self._called.append(self._node)
        return self._node


def test_engines_of_a_lost_node_are_not_waited_for(
    stable: Stable, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    waited: list[Any] = []
    nodes = [{"NodeID": "here", "Alive": True}, {"NodeID": "lost", "Alive": False}]
    monkeypatch.setattr(engines.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(engines.ray, "wait", lambda calls, **_: waited.extend(calls))
    monkeypatch.setattr(
        stable, "_free", {(node, ""): [Idle(node, called)] for node in ("here", "lost", "never")}
    )
    stable.rest()
    assert called == waited == ["here"]
