"""Whether an experiment fits is asked where it runs: in jobs, and once a cluster's nodes came."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
import ray

from qresafe.commands.running import STAGES
from qresafe.dist import runtime
from qresafe.dist.capacity import require_room
from qresafe.dist.runtime import RayRuntime
from qresafe.errors import ResourceError
from qresafe.presets import load_experiment
from ray_jobs import run_experiment, run_stage

MODEL = "meta-llama/Llama-2-7b-chat-hf"


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A joined cluster whose autoscaler starts two nodes when workers are waited for."""
    alive: list[dict[str, Any]] = []
    gpus = {"Alive": True, "Resources": {"GPU": 4.0, "accelerator_type:A10G": 1.0}}
    monkeypatch.setattr(ray, "nodes", lambda: alive)
    monkeypatch.setattr(runtime, "wait_for", lambda *_, **__: alive.extend([gpus, gpus]))
    return alive


def joined(ready: Any, **fields: Any) -> RayRuntime:
    """Return a runtime without a Ray session."""
    made = object.__new__(RayRuntime)
    resources = load_experiment(None, ["resources.workers=4", "resources.address=h:1"]).resources
    room = threading.Lock()
    vars(made).update(_ready=[ready], _room=room, _opened=True, _resources=resources, **fields)
    return made


def test_a_cluster_without_nodes_is_looked_at_once_they_are_there(
    nodes: list[dict[str, Any]],
) -> None:
    sets = ["resources.address=h:1", "resources.workers=4", "resources.gpus_per_worker=1"]
    spec = load_experiment(None, [*sets, f"model.path={MODEL}"])
    ready = partial(require_room, spec, MODEL, connected=True)
    ready()  # nothing is known yet, so nothing is refused
    assert nodes == []
    with pytest.raises(ResourceError, match=r"4xA10G-24 of the Ray cluster.*would fit"):
        joined(ready).check()


def test_it_is_asked_once(nodes: list[dict[str, Any]]) -> None:
    asked: list[int] = []
    made = joined(lambda: asked.append(len(nodes)))
    made.wait_for(1)
    made.wait_for(4)
    assert asked == [2]


def test_the_remedy_is_right_for_run_too(nodes: list[dict[str, Any]]) -> None:
    sets = ["resources.address=h:1", "resources.workers=4", "resources.gpus_per_worker=1"]
    spec = load_experiment(None, [*sets, f"model.path={MODEL}"])
    with pytest.raises(ResourceError, match="GPUs such as") as refused:
        joined(partial(require_room, spec, MODEL, connected=True)).check()
    assert "--cluster" not in str(refused.value)


def test_jobs_ask_whether_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    for job in (run_experiment, run_stage):
        monkeypatch.setattr(job, "execute", lambda *_, room=False, **__: asked.append(room))
    run_experiment.main("demo")
    for stage in STAGES:
        run_stage.main(stage, "demo")
    whole = {"patch", "export", "compare", "report"}
    assert asked == [True, *(stage in whole for stage in STAGES)]
