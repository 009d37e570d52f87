"""A lost cluster is one sentence; what a task raised is not taken for one."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorUnavailableError, RayTaskError

from qresafe.dist.lost import loss_told
from qresafe.errors import ResourceError


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
