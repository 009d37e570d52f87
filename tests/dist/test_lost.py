"""A lost cluster is one sentence; what a task raised is not taken for one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ray.exceptions import ActorUnavailableError, RayTaskError

from qresafe.dist import lost as lost_cluster
from qresafe.dist.lost import loss_told
from qresafe.errors import ResourceError
from qresafe.stages.runs import find_runs


def test_an_actor_that_cannot_be_reached() -> None:
    told = r"cluster was lost \(ActorUnavailableError: .*again"
    with pytest.raises(ResourceError, match=told), loss_told():
        raise ActorUnavailableError("RPC error: Socket\nclosed", b"1" * 16)


def test_an_error_of_a_task_stays() -> None:
    task = RayTaskError("compute", "trace", ValueError("ours"))
    with pytest.raises(RayTaskError), loss_told():
        raise task


def test_what_is_not_rays_stays() -> None:
    with pytest.raises(ValueError, match="ours"), loss_told():
        raise ValueError("ours")


def test_a_head_that_answers_again_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    # Looks at 0, 2, 4, ... s; ten without an answer are 18 s from the first to the last.
    clock, looks = [0.0], [True] * 2 + [False] * 10 + [True] + [False] * 11
    monkeypatch.setattr(lost_cluster.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(lost_cluster, "_answers", lambda _: looks.pop(0))
    monkeypatch.setattr(
        lost_cluster.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds)
    )
    told: list[float] = []
    assert lost_cluster.lost("head:1", lambda: True, 20, lambda: told.append(clock[0]))
    assert told == [4, 26]  # at the first look of each silence
    assert clock[0] == 2 * (2 + 10 + 1 + 10)  # the 11th failed look is 20 s after the first
    assert not looks
    assert not lost_cluster.lost("head:1", lambda: False, 20, lambda: None)


LEFT = """
import sys, time
from upath import UPath
from qresafe.dist import lost
from qresafe.driving import driving
from qresafe.progress import Silent
lost.LOOK_SECONDS = 0.05
lost._joined = lambda address: True
with driving(UPath(sys.argv[1]), Silent()) as progress:
    progress.start("generate W", 8, "completions")
    lost.ray.get_runtime_context = lambda: type("", (), {"gcs_address": sys.argv[2]})
    lost.watch_head()
    time.sleep(60)
"""


def test_a_driver_whose_head_is_gone_ends_in_a_sentence(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        words = [sys.executable, "-c", LEFT, str(tmp_path / "runs" / "r"), address]
        env = os.environ | {lost_cluster.RAYS_PATIENCE: "2"}
        ended = subprocess.run(words, capture_output=True, text=True, env=env, timeout=60)
    told = "the Ray cluster was lost (its head has not answered for 2 s)"
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.splitlines()[-1].startswith(f"error: {told} in {address}: see")
    (run,) = find_runs(str(tmp_path))
    assert run.state == "failed"
    assert run.failure
    assert (run.failure.stage, run.failure.what) == ("generate W", told)
