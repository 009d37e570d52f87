"""A demand that Ray's own autoscaler cannot meet, on a head whose machines are namespaces."""

from __future__ import annotations

import sys
import time

import pytest

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
