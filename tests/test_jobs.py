"""Jobs for real: a head of our own with token authentication, `ray job submit`, and the result."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ray_jobs.entry import job_experiment
from tests.heads import ROOT, Cluster

SMOKE = ["--preset", "cpu-smoke", "--json"]
SMOKE += ["--set", "control=false", "--set", "resources.workers=1"]


@pytest.mark.ray
@pytest.mark.timeout(560)
def test_a_whole_experiment_as_a_job(cluster: Cluster) -> None:
    storage = cluster.folder / "store"
    options = [*SMOKE, "--set", "evaluate.adapter=false", "--storage", str(storage)]
    job = cluster.submit("ray_jobs.run_experiment", *options)
    assert job.returncode == 0, job.stdout + job.stderr
    assert "SUCCEEDED" in job.stdout or "succeeded" in job.stdout
    (report,) = (storage / "runs" / "cpu-smoke" / "report").glob("*/report.html")
    assert (report.parent / "DONE").exists()
    (found,) = (storage / "runs" / "cpu-smoke" / "compare").glob("*/comparison.json")
    arms = json.loads(found.read_text())["arms"]
    assert [arm["label"] for arm in arms] == ["W", "Q0", "Q"]
    assert str(report) in job.stdout


@pytest.mark.ray
@pytest.mark.timeout(560)
@pytest.mark.long
def test_a_second_job_finds_everything_finished(cluster: Cluster) -> None:
    options = ["--stage", "export", *SMOKE, "--storage", str(cluster.folder / "twice")]
    jobs = [cluster.submit("ray_jobs.run_stage", *options) for _ in range(2)]
    for job in jobs:
        assert job.returncode == 0, job.stdout + job.stderr
    assert '"reused": false' in jobs[0].stdout
    assert '"reused": true' in jobs[1].stdout
    assert '"reused": false' not in jobs[1].stdout


SEARCH = {
    "name": "tiny-job",
    "base": "cpu-smoke",
    "set": {
        "control": False,
        "resources.workers": 0,
        "patch.checkpoint_every": 1,
        "evaluate.prompts": [{"axis": a, "limit": 8} for a in ("harmful", "benign", "borderline")],
    },
    "space": {"patch.mask.tau": {"uniform": [0.1, 1.0]}},
    "budget": {"trials": 5, "concurrent": 1},
    "probe": {"every": 3, "prompts": 8},
    "confirm": [],
}


@pytest.mark.ray
@pytest.mark.timeout(560)
@pytest.mark.long
def test_a_search_as_a_job_is_followed_stopped_and_resumed(cluster: Cluster) -> None:
    space, storage = cluster.folder / "space.yaml", cluster.folder / "searches"
    space.write_text(json.dumps(SEARCH))  # JSON is YAML
    options = ["--space", str(space), "--storage", str(storage)]
    background = ["--no-wait", "--submission-id", "first"]
    begun = cluster.submit("ray_jobs.search_patch", *options, options=background)
    assert begun.returncode == 0, begun.stdout + begun.stderr

    deadline = time.monotonic() + 300
    while not list(storage.rglob("trials/*.json")) and time.monotonic() < deadline:
        time.sleep(0.2)
    # Another terminal that knows the folder sees the trials so far.
    show = ["search", str(space), "--storage", str(storage), "--show", "--json"]
    seen = subprocess.run(
        [sys.executable, "-m", "qresafe.cli", *show], cwd=ROOT, capture_output=True, text=True
    )
    assert seen.returncode == 0, seen.stderr
    ended = json.loads(seen.stdout)["ended"]
    assert ended >= 1
    stopped = cluster.job("stop", "first")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert "STOPPED" in cluster.job("status", "first").stdout.upper()

    resumed = cluster.submit("ray_jobs.search_patch", *options, "--resume", "--json")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    (table,) = storage.glob("runs/tiny-job/search/*/trials.parquet")
    assert '"ended": 5' in resumed.stdout
    assert (table.parent / "best.yaml").exists()


@pytest.mark.ray
def test_a_mistake_fails_the_job_in_one_sentence(cluster: Cluster) -> None:
    job = cluster.submit("ray_jobs.run_experiment", "--preset", "cpu-smok")
    assert job.returncode != 0
    assert "error: no preset named 'cpu-smok': did you mean cpu-smoke" in job.stdout
    assert "Traceback" not in job.stdout


@pytest.mark.ray
def test_a_stranger_without_the_token_is_refused(cluster: Cluster) -> None:
    other = cluster.folder / "other"
    other.write_text(secrets.token_hex(32))
    job = cluster.submit("ray_jobs.run_stage", "--help", RAY_AUTH_TOKEN_PATH=str(other))
    assert job.returncode != 0
    assert "Usage" not in job.stdout


def test_a_job_keeps_its_results_outside_of_its_working_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def storage(given: str | None) -> str:
        return job_experiment("demo", [], None, given, None).storage

    monkeypatch.setenv("QRESAFE_STORAGE", str(tmp_path))
    assert storage(None) == str(tmp_path)
    assert storage("sub") == str(tmp_path / "sub")
    assert storage("/absolute") == "/absolute"
    assert storage("s3://bucket/x") == "s3://bucket/x"
    for bucket in ("s3://bucket/runs", "memory://bucket/runs"):
        monkeypatch.setenv("QRESAFE_STORAGE", bucket)
        assert storage(None) == bucket
        assert storage("sub") == f"{bucket}/sub"
        assert storage("/absolute") == "/absolute"
        assert storage("~/own") == str(Path.home() / "own")
        assert storage("s3://other/x") == "s3://other/x"
    monkeypatch.delenv("QRESAFE_STORAGE")
    assert storage(None) == str(Path.home() / "qresafe")


@pytest.mark.parametrize(
    ("module", "option"),
    [("run_experiment", "--preset"), ("run_stage", "--preset"), ("search_patch", "--space")],
)
def test_entry_points_run_as_modules(module: str, option: str) -> None:
    found = subprocess.run(
        [sys.executable, "-m", f"ray_jobs.{module}", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert option in found.stdout
