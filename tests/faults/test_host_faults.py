"""Whole hosts that go and come back under a run, and heads that restart: the same result."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from bench.fault_kinds import Kind
from bench.fault_runs import GENERATE, PATCH, Workload
from bench.faults import Bench, Result
from bench.host_faults import HostCluster, HostFault, faults
from tests.cluster.namespaces import needs_hosts

pytestmark = [pytest.mark.ray, pytest.mark.timeout(3600), needs_hosts()]


@pytest.fixture(params=["nothing", "rocksdb"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Bench, str]]:
    with closing(Bench(tmp_path / "b", HostCluster(request.param))) as made:
        yield made, request.param


def hit(bench: Bench, workload: Workload, kind: Kind) -> Result:
    found = bench.hit(workload, kind, random.Random(0), HostFault)
    assert found, "it had ended before the fault"
    assert found.ended, found.said
    assert not found.difference, found.difference
    return found


@pytest.mark.long
def test_the_result_is_that_of_a_run_without_faults(bench: tuple[Bench, str]) -> None:
    """A host cut off the network until Ray gave it up, and back; a head killed and restarted."""
    made, keep = bench
    restarted = hit(made, PATCH, Kind("restart", "head"))
    if keep == "nothing":
        assert restarted.runs > 1
        assert "it goes on" in restarted.said[0]  # and the same command goes on
        for workload in (GENERATE, PATCH):
            assert hit(made, workload, Kind("isolate", "host")).runs == 1
    else:
        assert restarted.runs == 1


def test_every_fault_of_a_host_is_asked_for_once() -> None:
    found = [(w.name, str(kind)) for w, kind, _ in faults(("isolate", "restart"), ["patch"], 0)]
    assert found == [
        ("patch", "host cut off the network until Ray gave it up, and back"),
        ("patch", "head (GCS and raylet) killed and started again"),
    ]
