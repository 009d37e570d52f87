"""Model judges on Ray: equal to this process's; and a real model server as the endpoint."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from upath import UPath

from qresafe.artifacts import Artifact, Run, read_manifest
from qresafe.dist.runtime import RayRuntime
from qresafe.judge_specs import ClassifierSpec, JudgeSpec, LlmSpec
from qresafe.progress import Silent
from qresafe.records import COMPLETION
from qresafe.specs import ResourcesSpec
from qresafe.stages.judge import FILE, judge
from qresafe.stages.judge_model import FILE as ANSWERS
from qresafe.stages.runtime import InProcessRuntime, Row, Runtime, read_table, write_table

pytestmark = pytest.mark.ray


def completed(run: Run) -> Artifact:
    rows = [
        dict.fromkeys(COMPLETION.names)
        | {"prompt_id": f"p{n}", "axis": "harmful", "prompt": f"request {n}", "sample": 0}
        | {"completion": "word " * (n % 7), "completion_ids": [], "prompt_tokens": 1}
        | {"new_tokens": 1, "finish": "stop"}
        for n in range(24)
    ]

    def work(folder: UPath) -> dict[str, Any]:
        write_table(folder / "completions.parquet", pa.Table.from_pylist(rows, schema=COMPLETION))
        return {}

    return run.stage("generate", spec={}, inputs={}, code_version=1, work=work)


def judged(folder: Path, judges: list[JudgeSpec], runtime: Runtime) -> list[Row]:
    run = Run(str(folder), "r")
    made = judge(run, completed(run), judges, Silent(), runtime=runtime)
    return read_table(made.path / FILE).to_pylist()


@pytest.fixture
def guard(tiny_llama: Path, tmp_path: Path) -> Path:
    """The tiny Llama with room for a guard's prompt."""
    folder = shutil.copytree(tiny_llama, tmp_path / "guard")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    return folder


@pytest.mark.long
def test_two_workers_give_the_verdicts_of_this_process(guard: Path, tmp_path: Path) -> None:
    # `strongreject` reads probabilities, so that every row has a verdict of its own.
    grader = ClassifierSpec.model_validate(
        {"judge": "classifier", "path": str(guard), "template": "strongreject", "batch_size": 4}
    )
    alone = judged(tmp_path / "alone", [grader], InProcessRuntime(threads=1))
    runtime = RayRuntime(ResourcesSpec(workers=2))
    try:
        spread = judged(tmp_path / "ray", [grader], runtime)
    finally:
        runtime.close()
    assert spread == alone
    assert len({row["reason"] for row in alone}) > 5
    assert all(row["reason"].startswith("score 0.") for row in alone)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def model_server(guard: Path) -> Iterator[str]:
    """`transformers serve` with the tiny Llama, without a network."""
    command = Path(sys.executable).with_name("transformers")
    if not command.exists():
        pytest.skip("no `transformers` command")
    port = free_port()
    words = [str(command), "serve", str(guard), "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(20)


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(240):
        if process.poll() is not None:
            pytest.skip("`transformers serve` does not start here")
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail("`transformers serve` does not answer")


@pytest.mark.long
def test_a_real_model_server_is_asked(
    model_server: str, guard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    asked = LlmSpec.model_validate(
        {"judge": "llm", "endpoint": model_server, "model": str(guard), "max_new_tokens": 8}
        | {"concurrency": 1, "timeout_seconds": 120}
    )
    found = judged(tmp_path / "out", [asked], InProcessRuntime())
    # A random model does not know the rubric's form: all is undecided, by its own noise.
    assert {row["outcome"] for row in found} == {"undecided"}
    assert all(row["reason"].startswith("malformed answer of the judge") for row in found)
    stage = next((UPath(tmp_path / "out") / "runs" / "r" / "ask").iterdir())
    counts = read_manifest(stage).counts
    assert (counts["asked"], counts["errors"]) == (24, 0)
    assert counts["cached"] == 0
    assert counts["new_tokens"] == sum(
        row["new_tokens"] for row in read_table(stage / ANSWERS).to_pylist()
    )
    assert counts["prompt_tokens"] > 24 * 1000
