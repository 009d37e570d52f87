"""qresafe on a cluster of three hosts: the same bytes as on one, and a user's mistakes in words."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from upath import UPath

from tests.cluster.namespaces import Hosts, needs_hosts
from tests.heads import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900), needs_hosts()]

# Every stage up to the patch, as small as it can be: quantize, W's and Q0's answers, pairs, patch.
SMALL = ["quantize.steps=2", "pairs.harmful=16", "pairs.benign=4", "pairs.recombined=4"]
SMALL += ["pairs.borderline=0", "pairs.max_new_tokens=16", "pairs.batch_size=4", "control=false"]
SMALL += ["patch.steps=6", "patch.lr=0.01", "patch.checkpoint_every=1"]
PATCH = ["patch", "cpu-smoke", "--workers", "2", *(w for s in SMALL for w in ("--set", s))]
RESULTS = {"completions.parquet", "pairs.parquet", "codes.safetensors", "adapter.safetensors"}
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """A head that computes nothing, and two hosts with a CPU each: two workers have to part.

    Outside them, a server that speaks S3.
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


@pytest.fixture(scope="module")
def expected(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What two workers on one host make, that of this process."""
    storage = tmp_path_factory.mktemp("one-host")
    env = {name: value for name, value in hosts.env.items() if name != "GLOO_SOCKET_IFNAME"}
    ended = subprocess.run(
        command(*PATCH, storage=storage), cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    (manifest,) = storage.rglob("patch/*/manifest.json")
    assert json.loads(manifest.read_text())["counts"]["codes_changed"] > 0
    made = results(UPath(storage))
    assert len(made) == 5  # completions of W and Q0, pairs, codes, adapter
    return made


def command(*arguments: str, storage: Path | str) -> list[str]:
    return [sys.executable, "-m", "qresafe.cli", *arguments, "--storage", str(storage)]


def joined(hosts: Hosts, *arguments: str, storage: Path | str) -> list[str]:
    """Return a command that joins the cluster, for the head's host."""
    address = f"resources.address={hosts.address}"
    return command(*arguments, "--set", address, storage=storage)


def results(storage: UPath) -> dict[str, bytes]:
    found = [path for path in storage.rglob("*") if path.name in RESULTS]
    return {"/".join(path.parts[-3:]): path.read_bytes() for path in found}


def actors_on(hosts: Hosts, host: int) -> set[str]:
    """Return the names of the actors that ran on a host, from its own Ray logs."""
    logs = (hosts.behind(host) / "ray").rglob("logs/worker-*.out")
    lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()]
    return {line.removeprefix(":actor_name:") for line in lines if line.startswith(":actor_name:")}


def test_a_patch_from_two_hosts_equals_that_from_one(
    hosts: Hosts, expected: dict[str, bytes]
) -> None:
    storage = hosts.folder / "storage"
    ended = hosts.run(0, joined(hosts, *PATCH, storage=storage), cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    assert results(UPath(storage)) == expected
    for kind in ("Engine", "TrainWorker"):
        assert all(any(kind in name for name in actors_on(hosts, host)) for host in (1, 2))


def test_a_run_on_s3_whose_driver_is_killed_goes_on_from_there(
    hosts: Hosts, expected: dict[str, bytes]
) -> None:
    """SIGKILL comes at the first checkpoint of six; the second driver finds it in the bucket."""
    url, endpoint = "s3://bucket/runs-of-us", hosts.env["AWS_ENDPOINT_URL"]
    bucket = UPath(
        url,
        key="test",
        secret="test",
        client_kwargs={"endpoint_url": endpoint},
        use_listings_cache=False,
    )
    bucket.fs.mkdir("bucket")
    driver = hosts.popen(0, joined(hosts, *PATCH, storage=url), cwd=ROOT, stderr=subprocess.PIPE)
    patch = bucket / "runs" / "cpu-smoke" / "patch"
    while driver.poll() is None and not list(patch.glob("*/work/checkpoints/*/meta.json")):
        time.sleep(0.1)
    driver.kill()
    _, told = driver.communicate()
    assert driver.returncode == -signal.SIGKILL, told
    assert results(bucket).keys() < expected.keys()
    ended = hosts.run(0, joined(hosts, *PATCH, storage=url), cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    assert "reused" in ended.stderr
    assert results(bucket) == expected


def test_a_model_on_one_host_only_is_told_before_any_work(
    hosts: Hosts, tmp_path: Path, tiny_llama: Path
) -> None:
    shutil.copytree(tiny_llama, hosts.behind(0) / "model")
    path = hosts.own / "model"
    asked = joined(hosts, *PATCH, "--set", f"model.path={path}", storage=tmp_path)
    ended = hosts.run(0, asked, cwd=ROOT)
    assert ended.returncode != 0
    names = {host: hosts.run(host, ["hostname"]).stdout.strip() for host in (1, 2)}
    lacking = [f"{name} ({hosts.ips[host]})" for host, name in names.items()]
    sentence = f"has no folder '{path}' in model.path: put the model where all hosts find it"
    assert any(f"host {host} {sentence}" in ended.stderr for host in lacking), ended.stderr
    assert "Traceback" not in ended.stderr
    assert not list(tmp_path.rglob("quantize"))


def test_a_storage_on_one_host_only_is_told_before_any_work(hosts: Hosts) -> None:
    ended = hosts.run(0, joined(hosts, *PATCH, storage=hosts.own / "storage"), cwd=ROOT)
    assert ended.returncode != 0
    assert f"does not see what is written here in {hosts.own}/storage" in ended.stderr
    assert "give a --storage that all hosts share" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not list(hosts.behind(0).rglob("quantize"))
