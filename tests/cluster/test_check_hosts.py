"""A storage or a model that only the driver's host has is told before any work, naming a host."""

from __future__ import annotations

import sys

import pytest

from tests.cluster.namespaces import Hosts, needs_hosts

pytestmark = [pytest.mark.ray, needs_hosts()]

DRIVER = """
import sys
from pathlib import Path
import ray
from upath import UPath
from qresafe.dist.hosts import check_hosts
from qresafe.errors import UserError

address, own, shared = sys.argv[1:]
ray.init(address, log_to_driver=False)
Path(own, "model").mkdir()
Path(shared, "model").mkdir()
for storage, model in ((own, shared), (shared, own), (shared, shared), ("memory://x", own)):
    try:
        check_hosts(UPath(storage) / "runs", [Path(model, "model")])
        print("fine")
    except UserError as error:
        print(error)
"""


def test_what_another_host_lacks_is_told_in_a_sentence() -> None:
    with Hosts(2) as hosts:
        hosts.start_head(cpus=0)
        hosts.start_worker(1)
        driver = [sys.executable, "-c", DRIVER, hosts.address, str(hosts.own), str(hosts.folder)]
        ended = hosts.run(0, driver)
        name = hosts.run(1, ["hostname"], check=True).stdout.strip()
    assert ended.returncode == 0, ended.stderr
    other = f"host {name} ({hosts.ips[1]})"
    lacks = f"{other} has no folder '{hosts.own}/model' in model.path: put the model where all "
    lacks += "hosts find it: a network folder, s3://, or a hub id."
    unseen = f"{other} does not see what is written here in {hosts.own}/runs: give a --storage "
    unseen += "that all hosts share: a network folder, or s3://bucket/path."
    elsewhere = f"{other} does not see what is written here in memory://x/runs: give a --storage "
    elsewhere += "that all hosts share: a network folder, or s3://bucket/path, and every host its "
    elsewhere += "keys and address."  # each process has a memory of its own
    assert ended.stdout.splitlines() == [unseen, lacks, "fine", elsewhere]
