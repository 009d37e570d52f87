"""Batches on Ray Data: equal to this process's, whatever dies; warm engines that hold nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
import ray
from ray import cloudpickle
from scraping import Scraped, scrape_until, total
from upath import UPath

from qresafe.artifacts import Artifact, Run
from qresafe.dist import preflight_ray, vllm
from qresafe.dist.runtime import RayRuntime, make_runtime
from qresafe.driving import driving
from qresafe.errors import ModelError, ResourceError, place_of
from qresafe.hf.models import resolve
from qresafe.hf.warm import ModelInput
from qresafe.progress import Silent
from qresafe.records import PROMPT
from qresafe.specs import GenerateSpec, ModelSpec, ResourcesSpec
from qresafe.stages.engines import VllmJob
from qresafe.stages.generate import FILE, generate
from qresafe.stages.runtime import (
    Batch,
    BatchFunction,
    InProcessRuntime,
    Row,
    Runtime,
    read_parts,
    read_table,
)

pytestmark = pytest.mark.ray
SAMPLED = GenerateSpec(max_new_tokens=32, batch_size=1, temperature=1.0, seed=5)


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayRuntime]:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "500")
        runtime = RayRuntime(ResourcesSpec(workers=2))
        yield runtime
        runtime.close()
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def complete(storage: Path, model: Path, runtime: Runtime, progress: Any = None) -> Artifact:
    rows = [
        {"prompt_id": f"p{i}", "axis": "benign", "prompt": "word " * (i % 7) + str(i)}
        for i in range(24)
    ]
    return generate(
        Run(str(storage), "r"),
        label="W",
        model=ModelInput.of(resolve(ModelSpec(path=str(model)))),
        prompts=pa.Table.from_pylist(rows, schema=PROMPT),
        spec=SAMPLED,
        runtime=runtime,
        progress=progress or Silent(),
    )


@pytest.fixture(scope="module")
def expected(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    folder = tmp_path_factory.mktemp("in-process")
    made = complete(folder, tiny_llama, make_runtime(ResourcesSpec(workers=0)))
    return read_table(made.path / FILE)


def test_two_actors_give_the_completions_of_this_process(
    cluster: RayRuntime, tmp_path: Path, tiny_llama: Path, expected: pa.Table
) -> None:
    made = complete(tmp_path, tiny_llama, cluster)
    assert read_table(made.path / FILE).equals(expected)
    assert made.manifest.counts["reused_parts"] == 0


@dataclass(frozen=True)
class HalfAnswered:
    """Answers the first of two rows with seven tokens, the other with an error."""

    def setup(self, device: str) -> BatchFunction:
        def compute(rows: list[Row]) -> pa.Table:
            return pa.table({"new_tokens": [7, 0], "error": [None, "no answer"]})

        return compute


def test_the_node_exports_the_figures_of_batches(cluster: RayRuntime, tmp_path: Path) -> None:
    root = UPath(tmp_path / "runs" / "figures")
    two = [Batch(i, [{"id": f"{i}a"}, {"id": f"{i}b"}]) for i in range(2)]
    # 2 batches of 2 rows, 7 tokens and one error each, by one or two processes
    expected = {"rows": 4.0, "generated_tokens": 14.0, "error_rows": 2.0, "batches": 2.0}

    def figures(found: Scraped) -> dict[str, float]:
        batches = total(found, "qresafe_batch_seconds", 'stage="generate"', 'le="+Inf"')
        names = ("rows", "generated_tokens", "error_rows")
        counts = {name: total(found, f"qresafe_{name}", 'stage="generate"') for name in names}
        return counts | {"batches": batches}

    with driving(root, Silent()) as progress:
        progress.start("generate W", 4, "completions")
        cluster.map_batches(HalfAnswered(), two, root / "generate" / "key" / "parts", progress)
        shown = "ray_qresafe_stage_done"  # of the driver; the last that it tells is 4
        enough = scrape_until(
            lambda found: (
                figures(found) == expected and 4 in [value for _, value in found.get(shown, [])]
            ),
            'run="figures"',
        )
        progress.finish()
    assert figures(enough) == expected
    for name in ("qresafe_stage_done", "qresafe_stage_total"):
        assert total(enough, name, 'stage="generate W"') == 4


@dataclass(frozen=True)
class Noting:
    """Takes its time over every batch, and notes in which process."""

    log: str
    seconds: float = 0.0
    action: Callable[[Row], None] | None = None

    def setup(self, device: str) -> BatchFunction:
        def compute(rows: list[Row]) -> pa.Table:
            with open(self.log, "a") as file:
                file.write(f"{os.getpid()}\n")
            time.sleep(self.seconds)
            if self.action:
                self.action(rows[0])
            return pa.table({"x": [row["x"] for row in rows]})

        return compute


def pids(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().split()]


def batches(count: int) -> list[Batch]:
    return [Batch(i, [{"x": 2 * i}, {"x": 2 * i + 1}]) for i in range(count)]


def workers_named(title: str) -> list[psutil.Process]:
    """Our own cluster's worker processes: other clusters may run on this machine."""
    found = psutil.Process().children(recursive=True)
    return [process for process in found if title in command(process)]


def command(process: psutil.Process) -> str:
    """Return a process's command line: none of one that has ended meanwhile."""
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def eventually(condition: Callable[[], bool], seconds: float = 30) -> bool:
    """Return whether `condition` comes true within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


class KillOnce(Silent):
    """Kills a process when the first part is done."""

    def __init__(self, victims: Callable[[], list[int]]) -> None:
        self._victims, self.killed = victims, 0

    def advance(self, done: int = 1, note: str = "") -> None:
        if not self.killed:
            self.killed = self._victims()[-1]
            os.kill(self.killed, signal.SIGKILL)


@pytest.mark.parametrize("victim", ["engine", "lease"])
def test_a_killed_actor_loses_and_repeats_nothing(
    cluster: RayRuntime, tmp_path: Path, victim: str
) -> None:
    log = tmp_path / "pids"
    progress = KillOnce(
        lambda: (
            pids(log)
            if victim == "engine"
            else [process.pid for process in workers_named("MapWorker")]
        )
    )
    parts = UPath(tmp_path / "parts")
    cluster.map_batches(Noting(str(log), 0.2), batches(8), parts, progress)
    assert progress.killed
    assert eventually(lambda: not psutil.pid_exists(progress.killed))
    assert read_parts(parts, 8)["x"].to_pylist() == list(range(16))


def test_engines_stay_warm_and_hold_no_cpu(cluster: RayRuntime, tmp_path: Path) -> None:
    seen = []
    for stage in ("first", "second"):
        log = tmp_path / stage
        cluster.map_batches(Noting(str(log)), batches(4), UPath(tmp_path / f"{stage}-p"), Silent())
        seen.append(set(pids(log)))
    cpus = ray.cluster_resources()["CPU"]
    alive = {process.pid for process in workers_named("ray::Engine")}
    assert seen[0] | seen[1] <= alive
    assert eventually(lambda: len(workers_named("ray::Engine")) == 2)
    assert eventually(lambda: ray.available_resources().get("CPU") == cpus)


def refuse(row: Row) -> None:
    raise ModelError("no such model", where="row 3", remedy="choose another")


def test_the_doctor_writes_to_the_storage_from_a_worker(
    cluster: RayRuntime, tmp_path: Path
) -> None:
    check = preflight_ray.storage_from_worker(str(tmp_path / "new"), None)
    assert check.status == "ok", check.detail
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").write_text("")
    check = preflight_ray.storage_from_worker(str(tmp_path / "file" / "x"), None)
    assert check.status == "fail"
    assert check.remedy


def test_a_users_mistake_keeps_its_sentence(cluster: RayRuntime, tmp_path: Path) -> None:
    job = Noting(str(tmp_path / "log"), action=refuse)
    folder = UPath(tmp_path / "runs" / "a" / "judge" / "key")
    with pytest.raises(ModelError, match=r"^no such model in row 3: choose another\.$") as caught:
        cluster.map_batches(job, batches(2), folder / "parts", Silent())
    place = place_of(caught.value)
    assert place["process"] in pids(tmp_path / "log")
    told = Path(place["log"]).read_text()
    assert f"process {place['process']} on {place['host']}\n" in told
    assert "ERROR ModelError: no such model in row 3: choose another." in told
    assert place["records"] == ["0", "1"]  # its rows have no ids: places in the batch


def test_too_small_a_cluster_is_compared_with_the_demand(cluster: RayRuntime) -> None:
    small = RayRuntime(ResourcesSpec(workers=500, wait_seconds=1))
    with pytest.raises(ResourceError, match=r"500 workers with 1 CPUs.*has \d+ CPUs.*room for"):
        small.wait_for(500)
    small.close()
    with pytest.raises(ResourceError, match=r"with 1 CPUs and 99 GPUs"):
        RayRuntime(ResourcesSpec(workers=1, gpus_per_worker=99, wait_seconds=1)).wait_for(1)


def test_the_processor_of_vllm_is_built_without_vllm(cluster: RayRuntime, tiny_llama: Path) -> None:
    from ray.data.llm import build_processor

    model = ModelInput.of(resolve(ModelSpec(path=str(tiny_llama))))
    job = VllmJob(model, GenerateSpec(engine="vllm"))
    resources = ResourcesSpec(workers=2, gpus_per_worker=1)
    processor = build_processor(vllm.processor_config(job, resources))
    assert processor.list_stage_names() == ["vLLMEngineStage"]
    with pytest.raises(ResourceError, match="needs a GPU for each worker"):
        cluster.map_batches(job, batches(1), UPath("memory://vllm"), Silent())


def test_no_workers_means_no_ray() -> None:
    assert isinstance(make_runtime(ResourcesSpec(workers=0)), InProcessRuntime)


DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_data import complete
from qresafe.dist.runtime import make_runtime
from qresafe.specs import ResourcesSpec
complete(Path({storage!r}), Path({model!r}), make_runtime(ResourcesSpec(workers=1)))
"""


def test_a_killed_driver_is_continued(
    cluster: RayRuntime, tmp_path: Path, tiny_llama: Path, expected: pa.Table
) -> None:
    code = DRIVER.format(
        tests=str(Path(__file__).parent), storage=str(tmp_path), model=str(tiny_llama)
    )
    with open(tmp_path / "driver.log", "w") as log:
        driver = subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log)
    family = psutil.Process(driver.pid)
    while driver.poll() is None and len(list(tmp_path.rglob("part-*.parquet"))) < 3:
        time.sleep(0.01)
    engines = [p for p in family.children(recursive=True) if "Engine" in command(p)]
    driver.kill()
    driver.wait()
    assert engines
    _, alive = psutil.wait_procs(engines, timeout=60)
    assert not alive, "the dead driver's engines live on"

    made = complete(tmp_path, tiny_llama, cluster)  # one actor's answers and two's
    assert read_table(made.path / FILE).equals(expected)
    assert 3 <= made.manifest.counts["reused_parts"] < 24, (tmp_path / "driver.log").read_text()
