"""Cluster files, checked without a cloud: Ray's own schema, KubeRay's types, and the lock."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[1]
CLOUDS = ["cluster.yaml", "clusters/gcp.yaml", "clusters/azure.yaml"]
CLUSTERS = [*CLOUDS, "clusters/local.yaml"]
MANIFESTS = ["k8s/raycluster.yaml", "k8s/rayjob.yaml"]
LOCK = dict(
    line.split("==") for line in (ROOT / "requirements.lock").read_text().split() if "==" in line
)


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def commands(name: str) -> str:
    config = read(name)
    keys = [key for key in config if key.endswith("commands")]
    return "\n".join(command for key in keys for command in config[key])


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config as `ray up` completes it, having validated it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    whole = prepare_config(copy.deepcopy(config))
    validate_config(whole)
    return whole


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_accepts_the_cluster(name: str) -> None:
    whole = prepared(read(name))
    assert whole["cluster_name"] == "qresafe"
    with pytest.raises(jsonschema.ValidationError):  # the schema does look
        prepared(read(name) | {"idle_timeout": 5})


@pytest.mark.parametrize("name", CLOUDS)
def test_gpu_workers_come_as_spot_first_and_go_when_idle(name: str) -> None:
    config = prepared(read(name))
    assert 0 < config["idle_timeout_minutes"] <= 15
    types = config["available_node_types"]
    head, spot, demand = types["head"], types["gpu-spot"], types["gpu-on-demand"]
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0
    assert spot["priority"] > demand["priority"]
    assert spot["resources"] == demand["resources"]
    for worker in (spot, demand):
        assert worker["min_workers"] == 0
        assert worker["resources"]["GPU"] > 0
    assert "spot" in str(spot["node_config"]).lower()
    assert "spot" not in str(demand["node_config"]).lower()
    assert config["provider"]["cache_stopped_nodes"] is False


def test_the_autoscaler_falls_back_to_on_demand() -> None:
    """Ray's own scheduler, asked for a GPU: spot, and on-demand where spot has just failed."""
    from ray.autoscaler.v2 import scheduler
    from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    types = prepared(read("cluster.yaml"))["available_node_types"]
    nodes = [
        scheduler.SchedulingNode.from_node_config(
            NodeTypeConfig(
                name=name,
                min_worker_nodes=0,
                max_worker_nodes=4,
                resources={key: float(value) for key, value in kind["resources"].items()},
                priority=kind["priority"],
            ),
            status=scheduler.SchedulingNodeStatus.TO_LAUNCH,
            node_kind=scheduler.NodeKind.WORKER,
        )
        for name, kind in types.items()
        if name != "head"
    ]

    def asked_for(available: dict[str, float]) -> str:
        best, _, _ = scheduler.ResourceDemandScheduler._sched_best_node(
            [ResourceRequestUtil.make({"GPU": 1})],
            copy.deepcopy(nodes),
            scheduler.ResourceRequestSource.PENDING_DEMAND,
            available,
            available,
        )
        return str(best.node_type)

    assert asked_for({}) == "gpu-spot"
    assert asked_for({"gpu-spot": 0.0}) == "gpu-on-demand"


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_node_has_the_lock_one_python_and_the_token(name: str) -> None:
    config, told = read(name), commands(name)
    assert config["file_mounts"]["~/qresafe-setup/requirements.lock"].endswith("requirements.lock")
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--requirement ~/qresafe-setup/requirements.lock" in told
    assert re.findall(r"--python (3\.\S+)", told) == [python_of_the_image()]
    starts = re.findall(r"[^;\n]*ray start .*", told)
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in start for start in starts)
    assert not re.search(r"\bray(\[|==| ?@)", told)  # Ray comes from the lock alone


@pytest.mark.parametrize("name", CLUSTERS)
def test_nothing_listens_to_the_outside_but_ssh(name: str) -> None:
    assert "--dashboard-host=127.0.0.1" in commands(name)
    assert "ray-client-server" not in commands(name)  # on by default: see SECURITY.md
    rules = read(name)["provider"].get("security_group", {}).get("IpPermissions", [])
    assert rules == []  # Ray's own two: port 22, and the cluster's nodes among themselves


# ---------------------------------------------------------------- Kubernetes


def python_of_the_image() -> str:
    found = re.search(r"^FROM python:(\d+\.\d+\.\d+)-", (ROOT / "k8s/Dockerfile").read_text(), re.M)
    assert found
    return found[1]


@pytest.mark.parametrize("name", MANIFESTS)
def test_kuberay_knows_every_key(name: str) -> None:
    validator = jsonschema.Draft202012Validator(read("tests/kuberay.schema.yaml"))
    manifest = read(name)
    assert [error.message for error in validator.iter_errors(manifest)] == []
    manifest["spec"]["workerGroupSpec"] = []
    assert not validator.is_valid(manifest)


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_manifests_agree_with_the_lock_and_keep_tokens_out(name: str) -> None:
    spec = read(name)["spec"]
    cluster = spec.get("rayClusterSpec", spec)
    assert cluster["rayVersion"] == LOCK["ray"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        secrets = [v for v in container["env"] if "TOKEN" in v["name"] or "KEY" in v["name"]]
        assert all("value" not in variable for variable in secrets)
    (gpu,) = cluster["workerGroupSpecs"]
    (worker,) = gpu["template"]["spec"]["containers"]
    amounts = worker["resources"]
    assert amounts["requests"]["nvidia.com/gpu"] == amounts["limits"]["nvidia.com/gpu"]


def test_both_manifests_make_the_same_cluster() -> None:
    standing, made = read(MANIFESTS[0])["spec"], read(MANIFESTS[1])["spec"]["rayClusterSpec"]
    assert standing == made


def test_the_job_of_the_manifest_is_one_that_there_is() -> None:
    from qresafe.presets import load_experiment

    words = read("k8s/rayjob.yaml")["spec"]["entrypoint"].split()
    assert words[:3] == ["python", "-m", "ray_jobs.run_experiment"]
    load_experiment(words[words.index("--preset") + 1])


def test_the_image_is_of_this_project() -> None:
    text = (ROOT / "k8s/Dockerfile").read_text()
    assert "--requirement requirements.lock" in text
    for word in re.findall(r"^COPY (.+) \S+$", text, re.M):
        assert all((ROOT / name).exists() for name in word.split()), word
    pinned = re.search(
        r'^requires-python = ">=(\d+\.\d+)', (ROOT / "pyproject.toml").read_text(), re.M
    )
    assert pinned
    assert python_of_the_image().startswith(pinned[1] + ".")
    assert "USER 1000" in text
