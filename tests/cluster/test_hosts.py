"""qresafe on three hosts and S3, its driver killed and started again: one host's bytes."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from moto.server import ThreadedMotoServer
from upath import UPath

from bench.host_runs import ROOT, command, on_one_host, results
from tests.cluster.namespaces import Hosts, needs_hosts

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(1800),
    pytest.mark.long,
    needs_hosts(),
]

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}


@pytest.fixture(scope="module")
def expected() -> dict[str, bytes]:
    """What two workers on one host make: answers of W and Q0, pairs, codes, adapter."""
    made = on_one_host(workers=2)
    assert len(made) == 5
    return made


@pytest.fixture(scope="module")
def hosts(expected: dict[str, bytes]) -> Iterator[Hosts]:
    """A head that computes nothing, and two hosts with a CPU each: two workers have to part.

    Outside them, a server that speaks S3. They start when the one host has ended.
    """
    with Hosts(3) as made:
        server = ThreadedMotoServer(ip_address=made.outside, port=0, verbose=False)
        server.start()
        address = "http://{}:{}".format(*server.get_host_and_port())
        made.env |= KEYS | {"AWS_ENDPOINT_URL": address, "AWS_DEFAULT_REGION": "us-east-1"}
        made.start_head(cpus=0)
        with ThreadPoolExecutor() as pool:
            list(pool.map(made.start_worker, (1, 2)))
        yield made
        server.stop()


def actors_on(hosts: Hosts, host: int) -> set[str]:
    """Return the names of the actors that ran on a host, from its own Ray logs."""
    logs = (hosts.behind(host) / "ray").rglob("logs/worker-*.out")
    lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()]
    return {line.removeprefix(":actor_name:") for line in lines if line.startswith(":actor_name:")}


def test_a_run_on_s3_whose_driver_is_killed_goes_on_from_there(
    hosts: Hosts, expected: dict[str, bytes]
) -> None:
    """SIGKILL comes at the first checkpoint of four; the second driver finds it in the bucket."""
    bucket = UPath(
        "s3://bucket/runs-of-us",
        key="test",
        secret="test",
        client_kwargs={"endpoint_url": hosts.env["AWS_ENDPOINT_URL"]},
        use_listings_cache=False,
    )
    bucket.fs.mkdir("bucket")
    words = command(str(bucket), workers=2, address=hosts.address)
    driver = hosts.popen(0, words, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    patch = bucket / "runs" / "cpu-smoke" / "patch"
    while driver.poll() is None and not list(patch.glob("*/work/checkpoints/*/meta.json")):
        time.sleep(0.1)
    driver.kill()
    _, told = driver.communicate()
    assert driver.returncode == -signal.SIGKILL, told
    assert len(results(bucket)) < len(expected)
    ended = hosts.run(0, words, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    for kind in ("Engine", "TrainWorker"):
        assert all(any(kind in name for name in actors_on(hosts, host)) for host in (1, 2))
    stages = json.loads(ended.stdout)["stages"]
    assert stages[-1]["counts"]["codes_changed"] > 0
    assert [stage["name"] for stage in stages if not stage["reused"]] == ["patch"]
    assert results(bucket) == expected
