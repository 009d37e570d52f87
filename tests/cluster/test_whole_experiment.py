"""The whole experiment as a job on three hosts, on a common folder and on S3: one host's bytes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from upath import UPath

from bench.host_runs import ROOT, TIMEOUT, WHOLE, WHOLE_RESULTS, on_one_host, results
from tests.cluster.namespaces import Hosts, needs_hosts

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(3600), needs_hosts()]

DASHBOARD = 8265
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}


@pytest.fixture(scope="module")
def expected() -> dict[str, bytes]:
    """What two workers on one host make by `qresafe run`."""
    made = on_one_host(2, WHOLE, whole=True)
    assert {name.split("/")[-1] for name in made} == WHOLE_RESULTS
    return made


@pytest.fixture
def hosts(expected: dict[str, bytes]) -> Iterator[Hosts]:
    """A head that computes nothing and takes jobs, and two hosts with a CPU each."""
    with Hosts(3) as made:
        options = ["--include-dashboard=true", f"--dashboard-host={made.ips[0]}"]
        made.start_head(cpus=0, options=[*options, f"--dashboard-port={DASHBOARD}"])
        with ThreadPoolExecutor() as pool:
            list(pool.map(made.start_worker, (1, 2)))
        yield made


def submitted(hosts: Hosts, storage: str, env: Sequence[str] = ()) -> str:
    """Submit the experiment from the head's host, and return the job's log."""
    words = ["qresafe", "submit", "cpu-smoke", f"--address=http://{hosts.ips[0]}:{DASHBOARD}"]
    words += ["--working-dir", str(ROOT), "--workers=2", f"--storage={storage}"]
    words += [word for setting in WHOLE for word in ("--set", setting)]
    words += [word for name in env for word in ("--env", name)]
    began = time.monotonic()
    ended = hosts.run(0, words, cwd=ROOT, timeout=TIMEOUT)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    print(f"{storage}: {time.monotonic() - began:.0f} s")  # shown with -s
    return ended.stdout


def engines_on(hosts: Hosts, host: int) -> int:
    """Return how many engines have computed on a host, from its own Ray logs."""
    logs = (hosts.behind(host) / "ray").rglob("logs/worker-*.out")
    return sum(":actor_name:Engine" in log.read_text(errors="replace") for log in logs)


def test_a_common_folder(hosts: Hosts, expected: dict[str, bytes]) -> None:
    storage = hosts.folder / "storage"
    told = submitted(hosts, str(storage))
    assert engines_on(hosts, 1)
    assert engines_on(hosts, 2)
    (report,) = Path(storage).rglob("report.html")
    assert str(report) in told.replace("\n", "")
    assert results(UPath(storage), WHOLE_RESULTS) == expected


def test_an_s3_server(hosts: Hosts, expected: dict[str, bytes]) -> None:
    server = ThreadedMotoServer(ip_address=hosts.outside, port=0, verbose=False)
    server.start()
    try:
        url = "http://{}:{}".format(*server.get_host_and_port())
        keys = KEYS | {"AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1"}
        client = {"endpoint_url": url}
        bucket = UPath("s3://bucket/runs-of-us", key="test", secret="test", client_kwargs=client,
                       use_listings_cache=False)  # fmt: skip
        bucket.fs.mkdir("bucket")
        hosts.env |= keys  # of the one who submits; the nodes have none: `--env` passes them on
        submitted(hosts, str(bucket), list(keys))
        assert results(bucket, WHOLE_RESULTS) == expected
        assert list(bucket.rglob("report.html"))
    finally:
        server.stop()
