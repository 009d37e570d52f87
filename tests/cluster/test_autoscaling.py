"""Ray's own autoscaler, on a head whose machines are namespaces: what it meets, and what not."""

from __future__ import annotations

import sys
import time

import pytest

from bench.autoscale import WORKERS, measure
from bench.host_runs import SETTINGS, command
from tests.cluster.namespaces import Hosts, needs_hosts
from tests.cluster.provider import Cloud
from tests.heads import ROOT

pytestmark = [pytest.mark.ray, needs_hosts()]

# A driver on the head; its argument is the head's address.
IMPATIENT = """
import sys
from qresafe.dist import autoscaler
from qresafe.dist.runtime import make_runtime
from qresafe.errors import ResourceError
from qresafe.specs import ResourcesSpec
autoscaler.PATIENCE_SECONDS = 3
try:
    make_runtime(ResourcesSpec(workers=2, gpus_per_worker=8, address=sys.argv[1])).check()
except ResourceError as error:
    print(error)
"""


def test_a_demand_that_no_node_type_meets_ends_in_a_sentence() -> None:
    with Hosts(3) as hosts:
        cloud = Cloud(hosts)
        cloud.start_head()
        began = time.monotonic()
        command = [sys.executable, "-c", IMPATIENT, hosts.address]
        told = hosts.run(0, command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
        took = time.monotonic() - began
        assert "2 workers with 1 CPUs and 8 GPUs each are wanted" in told.stdout, told.stderr
        assert "has 0 CPUs and 0 GPUs in all" in told.stdout
        assert "its autoscaler starts no node for them" in told.stdout
        assert took < 200  # without asking the autoscaler, it is 300: `wait_seconds`
        assert cloud.events() == []


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_run_on_no_node_gets_two_and_leaves_none() -> None:
    """As `make bench-autoscale` does it, which draws the time line."""
    lines, _, equal = measure()
    alive = [nodes for _, nodes in lines["nodes alive"]]
    assert (alive[0], max(alive), alive[-1]) == (0, WORKERS, 0)
    assert lines["CPUs asked for"][-1][1] == 0
    assert equal  # to the bytes of as many workers on one host


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_command_whose_demand_no_node_type_meets_ends_in_a_sentence() -> None:
    with Hosts(3) as hosts:
        cloud = Cloud(hosts)
        address, storage = cloud.start_head(), hosts.folder / "storage"
        settings = [*SETTINGS, "resources.gpus_per_worker=8", "resources.wait_seconds=900"]
        words = command(storage, workers=2, address=address, settings=settings)
        began = time.monotonic()
        ended = hosts.run(0, words, cwd=ROOT, timeout=600)
        took = time.monotonic() - began
        last = ended.stderr.strip().splitlines()[-1]
        assert ended.returncode == 2, ended.stderr
        assert last.startswith("error: 2 workers with 1 CPUs and 8 GPUs each are wanted")
        assert "its autoscaler starts no node for them" in last
        assert took < 300  # of the 900 that it may wait: the autoscaler was asked
        assert cloud.events() == []
