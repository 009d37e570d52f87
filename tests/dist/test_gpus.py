"""Which GPUs a joined cluster has: an "A100" is asked for its memory, and never guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from qresafe.dist import gpus
from qresafe.dist.capacity import ray_gpus
from qresafe.planning.hardware import GIB, hardware
from qresafe.specs import ResourcesSpec

WANTED = ResourcesSpec(workers=4, gpus_per_worker=1)


def nodes(*names: str) -> list[dict[str, Any]]:
    return [
        {"NodeID": f"n{i}", "Alive": True, "Resources": {"GPU": 4.0, f"accelerator_type:{name}": 1}}
        for i, name in enumerate(names)
    ]


def test_names_that_say_all_and_names_that_do_not() -> None:
    assert gpus.kinds_named("A100-40G") == ["A100-40"]
    assert gpus.kinds_named("A100") == ["A100-40", "A100-80"]
    assert gpus.kinds_named("L4") == ["L4-24"]
    assert gpus.kinds_named("V1000") == []


@pytest.mark.parametrize("told", [{"A100-40"}, {"A100-40", "A100-80"}, {None}, {"A100-80", None}])
def test_the_smallest_that_nodes_tell_counts(
    told: set[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: nodes("A100", "H100"))
    monkeypatch.setattr(gpus, "asked", lambda names: told if names == {"n0": "A100"} else set())
    found = ray_gpus(WANTED)
    if None in told:
        assert found is None  # then nothing is refused
    else:
        assert found
        left = hardware().gpus["A100-40"].memory_gib - hardware().reserve_gib
        assert found.memory == pytest.approx(left * GIB)


def test_what_nvidia_smi_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.kinds_here() == []
    tool = tmp_path / "nvidia-smi"
    told = "40960, NVIDIA A100-SXM4-40GB\\n81920, NVIDIA A100-SXM4-80GB\\n9, NVIDIA Mystery\\n"
    tool.write_text(f"#!/bin/sh\nprintf '{told}'\n")
    tool.chmod(0o755)
    assert gpus.kinds_here() == ["A100-40", "A100-80", None]
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert gpus.kinds_here() == []
