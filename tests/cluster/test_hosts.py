"""qresafe on a cluster of three hosts: the same bytes as on one, and a user's mistakes in words."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cluster.namespaces import Hosts, needs_hosts
from tests.heads import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600), needs_hosts()]

# Every stage up to the patch, as small as it can be: quantize, W's and Q0's answers, pairs, patch.
SMALL = ["quantize.steps=1", "pairs.harmful=16", "pairs.max_new_tokens=16", "patch.steps=3"]
SMALL += ["pairs.benign=4", "pairs.borderline=0", "pairs.recombined=4"]
PATCH = ["patch", "cpu-smoke", "--workers", "2", *(w for s in SMALL for w in ("--set", s))]
EQUAL = ("completions.parquet", "pairs.parquet", "codes.safetensors", "adapter.safetensors")


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """A head that computes nothing, and two hosts with a CPU each: two workers have to part."""
    with Hosts(3) as made:
        made.start_head(cpus=0)
        with ThreadPoolExecutor() as pool:
            list(pool.map(made.start_worker, (1, 2)))
        yield made


def command(*arguments: str, storage: Path) -> list[str]:
    return [sys.executable, "-m", "qresafe.cli", *arguments, "--storage", str(storage)]


def on_cluster(hosts: Hosts, *arguments: str, storage: Path) -> subprocess.CompletedProcess[str]:
    """Run qresafe on the head's host."""
    asked = [*arguments, "--set", f"resources.address={hosts.address}"]
    return hosts.run(0, command(*asked, storage=storage), cwd=ROOT)


def results(storage: Path) -> dict[str, bytes]:
    found = (
        path for path in storage.rglob("*") if path.name in EQUAL and path.parent.name != "work"
    )
    return {str(path.relative_to(storage)): path.read_bytes() for path in found}


def workers_of(hosts: Hosts, host: int) -> set[str]:
    """Return the classes of the actors that ran on a host, as its own Ray logs name them."""
    logs = (hosts.behind(host) / "ray").rglob("logs/worker-*.out")
    lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()]
    return {line.removeprefix(":actor_name:") for line in lines if line.startswith(":actor_name:")}


def test_a_patch_from_two_hosts_equals_that_from_one(hosts: Hosts, tmp_path: Path) -> None:
    shared = hosts.folder / "storage"
    alone = subprocess.run(
        command(*PATCH, storage=tmp_path), cwd=ROOT, env=hosts.env, capture_output=True, text=True
    )
    assert alone.returncode == 0, alone.stderr
    apart = on_cluster(hosts, *PATCH, storage=shared)
    assert apart.returncode == 0, apart.stderr
    found, expected = results(shared), results(tmp_path)
    assert len(expected) == 5  # two arms' completions, pairs, codes, adapter
    assert found == expected
    for host in (1, 2):
        assert any("Engine" in name for name in workers_of(hosts, host))
        assert any("TrainWorker" in name for name in workers_of(hosts, host))


def test_a_model_on_one_host_only_is_told_before_any_work(
    hosts: Hosts, tmp_path: Path, tiny_llama: Path
) -> None:
    shutil.copytree(tiny_llama, hosts.behind(0) / "model")
    path = hosts.own / "model"
    ended = on_cluster(hosts, *PATCH, "--set", f"model.path={path}", storage=tmp_path)
    assert ended.returncode != 0
    name = hosts.run(1, ["hostname"]).stdout.strip().removesuffix("1")
    told = f"host {name}"
    assert told in ended.stderr
    assert f"has no folder '{path}' in model.path: put the model where all hosts" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not list(tmp_path.rglob("quantize"))


def test_a_storage_on_one_host_only_is_told_before_any_work(hosts: Hosts) -> None:
    storage = hosts.own / "storage"
    ended = on_cluster(hosts, *PATCH, storage=storage)
    assert ended.returncode != 0
    assert "does not see what is written here in " in ended.stderr
    assert "give a --storage that all hosts share" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not list(hosts.behind(0).rglob("quantize"))
