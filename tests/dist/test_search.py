"""Real searches on a tiny model: killed, failing, stopped early, and on Ray Train workers."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from ray import cloudpickle

from qresafe.artifacts import Run
from qresafe.dist.search import run_search
from qresafe.driver_lock import sole_driver
from qresafe.errors import ResourceError, UserError
from qresafe.presets import load_experiment
from qresafe.progress import Silent
from qresafe.search_spec import Search, load_search
from qresafe.stages.search.check import check_search
from qresafe.stages.search.folder import BEST, FRONT, REPORT, STOPPED, TRIALS, search_folder
from qresafe.stages.search.ledger import Ledger

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

AXES = ("harmful", "benign", "borderline")
# Spent time, and the stages that hold it in their names or hashes.
TIMED = ("trial_seconds", "seconds")


def write_space(folder: Path, model: Path, **changes: Any) -> Path:
    """Write a search of a tiny random model: 12 steps, four prompts an axis, no confirmation."""
    prompts = [{"axis": axis, "split": "test", "limit": 4} for axis in AXES]
    base = {
        "storage": str(folder / "store"),
        "model.path": str(model),
        "control": False,
        "quantize": {"method": "rtn", "bits": 4, "group_size": 32},
        "pairs": {"harmful": 6, "benign": 6, "borderline": 4, "recombined": 4,
                  "max_new_tokens": 6, "keep": "different"},
        "evaluate.prompts": prompts,
        "evaluate.generate": {"max_new_tokens": 6},
        "patch.steps": 12,
        "patch.batch_size": 8,
        "patch.micro_batch_size": 8,
        "patch.rank": 4,
        "patch.checkpoint_every": 1,
        "patch.mask.samples": 4,
        "patch.mask.remask_every": 5,
        "resources.workers": 0,
    }  # fmt: skip
    data = {
        "name": "tiny",
        "base": "demo",
        "set": base,
        "space": {
            "patch.mask.tau": {"uniform": [0.1, 1.0]},
            "patch.lr": {"loguniform": [1e-4, 1e-2]},
        },
        "budget": {"trials": 6, "concurrent": 2},
        "probe": {"every": 4, "prompts": 4, "max_new_tokens": 6},
        "confirm": [],
    }
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(data | changes))))
    return path


def searched(path: Path) -> tuple[Search, pa.Table]:
    search = load_search(path)
    check_search(search)
    folder = run_search(search, Silent())
    return search, pq.read_table(str(folder / TRIALS))


def untimed(table: pa.Table) -> list[dict[str, Any]]:
    return table.drop_columns([name for name in TIMED if name in table.column_names]).to_pylist()


def start(path: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "qresafe.cli", "search", str(path), *more]
    log = open(path.with_suffix(".log"), "ab")
    return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {
        "OMP_NUM_THREADS": "1"})  # fmt: skip


@pytest.mark.timeout(1500)  # five drivers, each with a Ray of its own
def test_a_search_killed_at_random_moments_ends_as_one_left_alone(
    tmp_path: Path, tiny_llama: Path
) -> None:
    spaces = []
    for name in ("alone", "killed"):
        (tmp_path / name).mkdir()
        spaces.append(
            write_space(
                tmp_path / name,
                tiny_llama,
                searcher={"name": "optuna", "startup": 2},
                scheduler={"name": "asha", "grace": 4, "factor": 2},
                confirm=[0],
            )
        )
    alone, killed = spaces
    assert start(alone).wait(600) == 0, alone.with_suffix(".log").read_text()
    order, folder = random.Random(0), search_folder(load_search(killed))
    kills = 0
    for number in range(3):
        driver = start(killed)
        wanted = len(Ledger(folder).read()) + 1 + number % 2
        while driver.poll() is None and len(Ledger(folder).read()) < wanted:
            time.sleep(0.05)
        time.sleep(order.uniform(0, 0.5))
        kills += driver.poll() is None
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert kills >= 2
    assert start(killed, "--resume").wait(600) == 0, killed.with_suffix(".log").read_text()
    tables = [pq.read_table(str(search_folder(load_search(p)) / TRIALS)) for p in spaces]
    assert untimed(tables[0]) == untimed(tables[1])
    pages = [(search_folder(load_search(p)) / REPORT).exists() for p in spaces]
    assert pages == [True, True]


def test_the_results_of_a_search(tmp_path: Path, tiny_llama: Path) -> None:
    path = write_space(tmp_path, tiny_llama, space={"patch.rank": {"choice": [2, 4]}})
    search, table = searched(path)
    folder = search_folder(search)
    assert table.num_rows == 6
    assert set(table["status"].to_pylist()) == {"completed"}
    # Rank 4 is the default: one trial of each rank was run, and the others share their results.
    assert len([r for r in table["same_as"].to_pylist() if r is None]) == 2
    run = Run(search.validation.storage, "tiny")
    for stage, count in (("quantize", 1), ("pairs", 1), ("patch", 2), ("export", 2)):
        assert len(list((run.root / stage).iterdir())) == count, stage
    best = load_experiment(str(folder / BEST))
    assert best.patch.rank in (2, 4)
    assert {one.split for one in best.evaluate.prompts} == {"test"}
    front = [load_experiment(str(p)) for p in (folder / FRONT).iterdir()]
    assert best.patch in [spec.patch for spec in front]
    for key, rank in zip(table["patch_key"].to_pylist(), table["patch.rank"].to_pylist(),
                         strict=True):  # fmt: skip
        manifest = json.loads((run.folder("patch", key) / "manifest.json").read_text())
        assert manifest["spec"]["rank"] == rank
    # A search that is finished costs nothing, and writes the same table.
    assert searched(path)[1].equals(table)


def test_pbt_members_go_on_from_their_parents(tmp_path: Path, tiny_llama: Path) -> None:
    path = write_space(
        tmp_path,
        tiny_llama,
        space={"patch.lr": {"loguniform": [1e-4, 1e-2]}},
        scheduler={"name": "pbt", "interval": 4, "quantile": 0.5},
        budget={"trials": 2, "concurrent": 2},
    )
    search, table = searched(path)
    rows = list(Ledger(search_folder(search)).read().values())
    assert table["status"].to_pylist() == ["completed"] * 6  # 2 members x 12 / 4 steps
    assert [row.continued is not None for row in rows if row.index >= 2].count(True) >= 2
    # The last generation's patches, trained from their first step, have the same codes.
    last = next(row for row in rows[4:] if row.params.get("patch.changes"))
    run = Run(search.validation.storage, "tiny")
    continued = (run.folder("patch", last.keys["patch"]) / "codes.safetensors").read_bytes()
    fresh = search.at(str(tmp_path / "fresh"))
    from qresafe.stages.experiment import Experiment
    from qresafe.stages.runtime import InProcessRuntime, cpu_threads

    with cpu_threads(1):
        patched = Experiment(fresh.trial(last.params), InProcessRuntime(threads=1)).patched
    assert (patched.path / "codes.safetensors").read_bytes() == continued
    assert patched.key == last.keys["patch"]


def test_failures_are_rows_and_three_of_a_kind_end_the_search(
    tmp_path: Path, tiny_llama: Path
) -> None:
    # A rate of 1e30 without warm-up or clipping leaves the finite numbers at once.
    path = write_space(tmp_path, tiny_llama, space={"patch.lr": {"choice": [1e28, 1e29, 1e30,
        1e31, 1e32, 1e33, 1e34]}}, searcher={"name": "grid"}, budget={"trials": 8})  # fmt: skip
    data = yaml.safe_load(path.read_text())
    data["set"] |= {"patch.max_grad_norm": 1e30, "patch.warmup_steps": 0,
                    "patch.through_grid": False}  # fmt: skip
    path.write_text(yaml.safe_dump(data))
    search = load_search(path)
    with pytest.raises(UserError, match=r"[34] trials failed with diverged, the last one: the "):
        run_search(search, Silent())
    folder = search_folder(search)
    assert "diverged" in (folder / STOPPED).read_text()
    rows = list(Ledger(folder).read().values())
    assert rows[0].status == "completed"  # the experiment's own spec
    failed = [row for row in rows if row.status == "failed"]
    assert 3 <= len(failed) <= 4  # two at a time
    assert all("lower patch.lr" in str(row.reason) for row in failed)
    assert (folder / REPORT).exists()


def test_a_trial_on_train_workers_is_stopped_like_any_other(
    tmp_path: Path, tiny_llama: Path
) -> None:
    asha = {"name": "asha", "grace": 4, "factor": 4, "metric": "benign_refusal"}
    path = write_space(
        tmp_path,
        tiny_llama,
        budget={"trials": 3, "concurrent": 1},
        searcher={"lag": 1},
        scheduler=asha,
        probe={"every": 4, "prompts": 4, "axes": ["benign"], "max_new_tokens": 6},
    )
    tables = []
    for workers, store in ((0, "a"), (1, "b")):
        found = load_search(path, [f"resources.workers={workers}", "patch.zero_stage=0"])
        found = found.at(str(tmp_path / store))
        folder = run_search(found, Silent())
        tables.append(pq.read_table(str(folder / TRIALS)))
        curve = json.loads(tables[-1]["curve"].to_pylist()[0])
        assert [look["step"] for look in curve] == [4, 8, 12]
    assert untimed(tables[0]) == untimed(tables[1])


def test_more_than_the_cluster_has_is_said_before_the_first_trial(
    tmp_path: Path, tiny_llama: Path
) -> None:
    path = write_space(tmp_path, tiny_llama)
    many = load_search(path, ["resources.workers=500", "resources.wait_seconds=1"])
    with pytest.raises(ResourceError, match=r"500 workers with 1 CPUs.*room for \d"):
        run_search(many, Silent())
    wide = load_search(path, ["resources.cpus_per_worker=999", "resources.wait_seconds=1"])
    with pytest.raises(ResourceError, match=r"1 workers with 999 CPUs"):
        run_search(wide, Silent())
    assert not list((tmp_path / "store").rglob("trials"))


def test_two_drivers_do_not_run_one_search(tmp_path: Path, tiny_llama: Path) -> None:
    search = load_search(write_space(tmp_path, tiny_llama))
    run = search_folder(search).parent.parent
    with sole_driver(run), pytest.raises(ResourceError, match="has a driver already"):
        run_search(search, Silent())


# ---------------------------------------------------------------- trials that die


def dying(mark: Path, index: int, times: int, real: Any) -> Any:
    """Return `make_trainable` whose trial `index` kills its own process so many times."""

    def make(search: Search) -> Any:
        trainable = real(search)

        def deadly(config: dict[str, Any]) -> None:
            if config["trial"] == index:
                deaths = len(mark.read_text()) if mark.exists() else 0
                if deaths < times:
                    mark.write_text("x" * (deaths + 1))
                    os.kill(os.getpid(), signal.SIGKILL)
            trainable(config)

        return deadly

    return make


@pytest.mark.parametrize("times", [1, 3])
def test_a_trial_whose_process_dies(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    from qresafe.dist import search as module

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    real = module.make_trainable
    monkeypatch.setattr(module, "make_trainable", dying(tmp_path / "mark", 1, times, real))
    path = write_space(tmp_path, tiny_llama, budget={"trials": 3, "concurrent": 1})
    search = load_search(path)
    run_search(search, Silent())
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    rows = list(Ledger(search_folder(search)).read().values())
    expected = "completed" if times == 1 else "failed"  # it is tried again twice
    assert [row.status for row in rows] == ["completed", expected, "completed"]
    if times == 3:
        assert (rows[1].kind, rows[1].reason) == (
            "killed",
            "the trial's process or node was lost again and again",
        )


# ---------------------------------------------------------------- trackers


def test_mlflow_and_tensorboard_hear_of_every_trial(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    path = write_space(
        tmp_path,
        tiny_llama,
        budget={"trials": 3, "concurrent": 1},
        trackers=["mlflow", "tensorboard"],
    )
    search, table = searched(path)
    folder = search_folder(search)
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("tiny")
    runs = client.search_runs([experiment.experiment_id])
    found = {int(run.data.params["trial"]): run.data.metrics for run in runs}
    assert sorted(found) == [0, 1, 2]
    for index, value in zip(table["trial"].to_pylist(), table["over_refusal"].to_pylist(),
                            strict=True):  # fmt: skip
        assert found[index]["over_refusal"] == pytest.approx(value)
    events = list(Path(str(folder / "tensorboard")).rglob("events.out.tfevents.*"))
    assert len(events) == 3
