"""`qresafe submit`: checked here, then for real against a head with token authentication."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
import requests
import typer

from qresafe.cli import main
from qresafe.commands.submit import NOT_FOLLOWED, command_of
from qresafe.commands.submit import _follow as follow
from qresafe.dist import jobs
from qresafe.dist.upload import measure_upload
from qresafe.errors import ResourceError, SpecError
from tests.heads import ROOT, Cluster


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the one sentence that `qresafe submit` ends with."""
    with pytest.raises(SystemExit) as leaving:
        main(["submit", *words])
    said = capsys.readouterr().err.strip().splitlines()
    assert leaving.value.code == 2
    assert said[-1].startswith("error: ")
    assert not any("Traceback" in line for line in said)
    return said[-1]


def test_command_lines_are_those_of_the_jobs() -> None:
    python = ["python", "-m"]
    whole = command_of("demo", None, False, ["--workers=2"])
    assert whole == [*python, "ray_jobs.run_experiment", "--preset", "demo", "--workers=2"]
    stage = command_of("demo", "pairs", False, [])
    assert stage == [*python, "ray_jobs.run_stage", "--stage", "pairs", "--preset", "demo"]
    search = command_of("quick-cpu", None, True, [])
    assert search == [*python, "ray_jobs.search_patch", "--space", "quick-cpu"]
    with pytest.raises(SpecError, match="unknown stage 'pair'"):
        command_of("demo", "pair", False, [])
    with pytest.raises(SpecError, match="exclude each other"):
        command_of("demo", "pairs", True, [])


def test_mistakes_end_before_anything_is_sent(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv(jobs.ADDRESS, raising=False)
    folder = ["--working-dir", str(ROOT)]
    assert "did you mean cpu-smoke" in refused(capsys, "cpu-smok", *folder)
    elsewhere = ["--working-dir", str(tmp_path)]
    assert "not qresafe's folder" in refused(capsys, "demo", *elsewhere)
    (tmp_path / "own.yaml").write_text("name: own\n")
    assert "outside of what is sent" in refused(capsys, str(tmp_path / "own.yaml"), *folder)
    said = refused(capsys, "demo", *folder, "--env", "HF_TOKEN=hf_secret")
    assert "its name alone" in said
    assert "hf_secret" not in said
    assert "not set here" in refused(capsys, "demo", *folder, "--env", "NO_SUCH_THING")
    for address in ("http://127.0.0.1:1", "127.0.0.1:1"):
        said = refused(capsys, "demo", *folder, "--address", address)
        assert said.startswith("error: nothing answers at http://127.0.0.1:1 (Connection refused)")
    assert "no address" in refused(capsys, "demo", *folder, "--address", "ray://head:10001")
    assert "no address" in refused(capsys, "demo", *folder, "--address", "http://head:port")
    assert "no PRESET" in refused(capsys)
    unreached = [*folder, "--address", "http://127.0.0.1:1"]
    assert "no search space named 'nosuchspace'" in refused(
        capsys, "nosuchspace", "--search", *unreached
    )
    words = ["quick-cpu", "--search", "--set", "nonsense.key=1", *unreached]
    assert "nonsense" in refused(capsys, *words)


def test_a_missing_token_is_found_here(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    said = refused(capsys, "--stop", "x")
    assert said.startswith(f"error: no token at {tmp_path / 'none'}: ray get-auth-token")


def test_only_named_variables_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in jobs.PASSED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("MINE", "c")
    assert jobs.chosen_environment([]) == {"HF_TOKEN": "a"}
    assert jobs.chosen_environment(["MINE"]) == {"HF_TOKEN": "a", "MINE": "c"}


def test_an_upload_over_the_limit_is_refused_unsent(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"x" * 10)
    with open(tmp_path / "big.bin", "wb") as file:
        file.truncate(101 * 2**20)  # sparse: takes no disk
    assert measure_upload(tmp_path, ["*.bin"]).sizes == {Path("small"): 10}

    class Unused:
        def __getattr__(self, name: str) -> None:
            pytest.fail(f"{name} was called")

    job = jobs.Job(["true"], tmp_path)
    told = r"too large \(101.0 of 100 MiB, 2 files; largest: big.bin, small\)"
    with pytest.raises(ResourceError, match=told):
        jobs.submit(Unused(), job, print)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("address", "url", "clear"),
    [
        ("head", "http://head:8265", True),
        ("127.0.0.1:99", "http://127.0.0.1:99", False),
        ("https://head", "https://head:443", False),
        ("http://[::1]:8265/", "http://[::1]:8265", False),
    ],
)
def test_addresses(address: str, url: str, clear: bool) -> None:
    assert jobs.dashboard_url(address) == url
    assert jobs.in_the_clear(address) is clear


def test_a_log_goes_on_where_the_connection_broke() -> None:
    sent = [["one\n", "tw"], ["one\n", "two\n", "three\n"]]  # each time from its beginning
    told = SimpleNamespace(status="FAILED", driver_exit_code=3, message="because\nTraceback")

    class Client:
        connections = 0

        def get_address(self) -> str:
            return "http://head:8265"

        async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
            self.connections += 1
            for text in sent[self.connections - 1]:
                yield text
            if self.connections < len(sent):
                raise RuntimeError("WebSocket connection closed unexpectedly")

        def get_job_status(self, job: str) -> SimpleNamespace:
            return SimpleNamespace(is_terminal=lambda: self.connections == len(sent))

        def get_job_info(self, job: str) -> SimpleNamespace:
            return told

    log: list[str] = []
    ending = jobs.follow(Client(), "id", log.append)  # type: ignore[arg-type]
    assert "".join(log) == "one\ntwo\nthree\n"
    assert ending == jobs.Ending("FAILED", 3, "because")


class Away:
    """A client whose cluster is away for so many questions after each answer, then done."""

    def __init__(self, times: int) -> None:
        self.times = self.left = times

    def get_address(self) -> str:
        return "http://head:8265"

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield "one\n"
        raise aiohttp.ClientConnectionError("Cannot connect to host head:8265")

    def _asked(self) -> SimpleNamespace:
        self.left -= 1
        if self.left >= 0:
            raise requests.ConnectionError("Connection refused")
        self.left = self.times
        return SimpleNamespace(is_terminal=lambda: True, status="SUCCEEDED", message="")

    def get_job_status(self, job: str) -> SimpleNamespace:
        return self._asked()

    def get_job_info(self, job: str) -> SimpleNamespace:
        return SimpleNamespace(**vars(self._asked()) | {"status": jobs.JobStatus.SUCCEEDED})


def test_a_cluster_that_is_away_for_a_moment_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jobs, "AGAIN_SECONDS", 0.0)
    log: list[str] = []
    ending = jobs.follow(Away(2), "id", log.append)  # type: ignore[arg-type]
    assert (log, ending.code) == (["one\n"], 0)


def test_a_cluster_that_stays_away_is_no_mistake_of_the_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jobs, "AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(jobs, "AWAY_SECONDS", 0.1)
    with pytest.raises(typer.Exit) as leaving:
        follow(Away(10**9), "id")  # type: ignore[arg-type]
    assert leaving.value.exit_code == NOT_FOLLOWED
    said = capsys.readouterr().err
    assert "no answer to use from http://head:8265 (Connection refused)" in said
    assert "the job goes on, unless its cluster ended" in said
    assert "qresafe submit --stop id" in said


# ---------------------------------------------------------------- for real

API = """
import sys
from pathlib import Path
from qresafe.dist import jobs
client = jobs.connect(sys.argv[1])
code = "import os, sys; print('secret', len(os.environ['HF_TOKEN'])); sys.exit(7)"
job = jobs.Job(["python", "-c", code], Path(sys.argv[2]), [], jobs.chosen_environment([]))
made = jobs.submit(client, job, print)
print(jobs.follow(client, made, lambda text: print(text, end="")))
slow = jobs.Job(["python", "-c", "import time; time.sleep(600)"], Path(sys.argv[2]))
print(jobs.stop(client, jobs.submit(client, slow, print)))
try:
    jobs.stop(client, "nobody")
except Exception as error:
    print(type(error).__name__, error)
"""


def python(cluster: Cluster, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = cluster.env | {"PYTHONPATH": str(ROOT)} | env
    command = [sys.executable, *words]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )


@pytest.mark.ray
def test_jobs_are_sent_followed_and_stopped(cluster: Cluster) -> None:
    folder = cluster.folder / "job"
    folder.mkdir()
    (folder / "file").write_text("x")
    done = python(cluster, "-c", API, cluster.address, str(folder), HF_TOKEN="hf_secret")
    said = done.stdout + done.stderr
    assert "upload: 0.0 of 100 MiB, 1 files" in said
    assert "passed on from the environment: HF_HUB_OFFLINE, HF_TOKEN" in said
    assert "secret 9" in said  # the job has it ...
    assert "hf_secret" not in said  # ... and nobody has printed it
    assert "Ending(status='FAILED', code=7" in said, said
    assert "Ending(status='STOPPED', code=1" in said, said
    assert f"ResourceError no job 'nobody' at {cluster.address}" in said


@pytest.mark.long
@pytest.mark.ray
def test_the_command_ends_with_the_jobs_code(cluster: Cluster) -> None:
    command = ["-m", "qresafe.cli", "submit", "cpu-smoke", "--address", cluster.address]
    options = ["--stage", "quantize", "--set", "model.path=/nowhere", "--workers", "0"]
    done = python(cluster, *command, *options)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "error: " in done.stdout  # the job's own log
    assert "/nowhere" in done.stdout
    assert "FAILED" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.ray
def test_a_strangers_token_is_refused_in_a_sentence(cluster: Cluster) -> None:
    other = cluster.folder / "stranger"
    other.write_text(secrets.token_hex(32))
    other.chmod(0o600)
    words = ["-m", "qresafe.cli", "submit", "--stop", "x", "--address", cluster.address]
    for env in ({"RAY_AUTH_TOKEN_PATH": str(other)}, {"RAY_AUTH_MODE": "disabled"}):
        done = python(cluster, *words, **env)
        assert done.returncode == 2
        said = done.stderr.strip().splitlines()
        assert said[-1].startswith(f"error: the cluster at {cluster.address} refuses the token")
        assert "Traceback" not in done.stderr
