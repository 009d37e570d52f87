"""Real searches on a tiny model: killed, failing, stopped early, and on Ray Train workers."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from qresafe.artifacts import Run
from qresafe.dist.search import run_search
from qresafe.driver_lock import sole_driver
from qresafe.errors import ResourceError, UserError
from qresafe.presets import load_experiment
from qresafe.progress import Silent
from qresafe.search_spec import load_search
from qresafe.stages.search.folder import (
    BEST,
    CONFIRMATION,
    FRONT,
    REPORT,
    STOPPED,
    TRIALS,
    search_folder,
)
from qresafe.stages.search.ledger import Ledger
from tests.tiny_search import searched, untimed, write_space

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def test_the_results_of_a_search(tmp_path: Path, tiny_llama: Path) -> None:
    path = write_space(tmp_path, tiny_llama, space={"patch.rank": {"choice": [2, 4]}},
        budget={"trials": 4, "concurrent": 2})  # fmt: skip
    search, table = searched(path)
    folder = search_folder(search)
    assert table.num_rows == 4
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
    # A search that is finished costs nothing, and writes the same table. A confirmation that an
    # earlier session left is of that session's winner.
    (folder / CONFIRMATION).write_text("of another winner")
    assert searched(path)[1].equals(table)
    assert not (folder / CONFIRMATION).exists()


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
def test_a_trial_on_train_workers_is_stopped_like_any_other(
    tmp_path: Path, tiny_llama: Path
) -> None:
    asha = {"name": "asha", "grace": 4, "factor": 4, "metric": "benign_refusal"}
    path = write_space(
        tmp_path,
        tiny_llama,
        budget={"trials": 2, "concurrent": 1},
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


@pytest.mark.long
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


# ---------------------------------------------------------------- trackers


@pytest.mark.long
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
