"""Runs under a storage root: what is listed, what differs, and what a prune may take."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from upath import UPath

from qresafe import driver_lock, progress_file
from qresafe.artifacts import Artifact, Run
from qresafe.driver_lock import Driver, sole_driver
from qresafe.errors import CorruptArtifactError, DataError, ResourceError, UserError
from qresafe.progress_file import RunProgress
from qresafe.stages.runs import RunFolder, differences, find_runs, pick, plan_removal, remove


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path)
    return f"memory://runs-{os.getpid()}-{time.monotonic_ns()}"


def make(storage: str, name: str, stage: str, spec: dict[str, Any], work: int = 0) -> Artifact:
    """Finish a stage of 100 bytes of result and `work` bytes of work files."""

    def fill(folder: UPath) -> dict[str, Any]:
        (folder / "result").write_bytes(b"r" * 100)
        if work:
            (folder / "work" / "parts").mkdir(parents=True)
            (folder / "work" / "parts" / "0").write_bytes(b"w" * work)
        return {}

    run = Run(storage, name)
    return run.stage(stage, spec=spec, inputs={}, code_version=1, work=fill)


def cut_off(storage: str, name: str, stage: str) -> UPath:
    """Leave what a killed stage leaves: 10 bytes of work, no mark."""
    folder = Run(storage, name).folder(stage, "0123456789abcdef")
    (folder / "work").mkdir(parents=True)
    (folder / "work" / "part").write_bytes(b"w" * 10)
    return folder


def one(storage: str, name: str = "a") -> RunFolder:
    return pick(find_runs(storage), name)


def test_runs_are_listed_with_sizes_stages_and_state(storage: str) -> None:
    made = make(storage, "a", "quantize", {"bits": 4}, work=30)
    make(storage, "b", "quantize", {"bits": 4})
    cut_off(storage, "b", "patch")
    first, second = find_runs(storage)
    assert [first.name, first.state, len(first.finished)] == ["a", "finished", 1]
    (stage,) = first.stages
    marks = sum((made.path / name).stat().st_size for name in ("manifest.json", "DONE"))
    assert (stage.stage, stage.key, stage.work_bytes) == ("quantize", made.key, 30)
    assert stage.bytes == 100 + 30 + marks
    assert abs((stage.finished or 0) - time.time()) < 60
    assert [second.state, len(second.stages), len(second.finished)] == ["unfinished", 2, 1]
    with sole_driver(Run(storage, "a").root):
        assert one(storage).state == "running"


def test_specs_are_compared_key_by_key(storage: str) -> None:
    specs = [{"bits": bits, "calibration": {"seed": 0, "n": n}} for bits, n in ((4, 1), (3, 2))]
    for name, spec in zip("ab", specs, strict=True):
        make(storage, name, "quantize", spec)
    make(storage, "b", "patch", {"rank": 8})  # the other run has none to compare it with
    found = differences(one(storage, "a"), one(storage, "b"))
    assert found == {"quantize.bits": (4, 3), "quantize.calibration.n": (1, 2)}
    assert differences(one(storage, "a"), one(storage, "a")) == {}


def test_reports_are_compared_by_the_whole_spec(storage: str) -> None:
    for name, axis in (("a", "harmful"), ("b", "benign")):
        spec = {"name": name, "storage": "x", "evaluate": {"prompts": [{"axis": axis, "n": 1}]}}
        make(storage, name, "report", spec)
    found = differences(one(storage, "a"), one(storage, "b"))
    assert found == {"evaluate.prompts.0.axis": ("harmful", "benign")}
    make(storage, "c", "quantize", {"bits": 4})
    with pytest.raises(DataError, match="a and c have no finished stage in common"):
        differences(one(storage, "a"), one(storage, "c"))


def test_a_prune_takes_work_files_and_no_result(storage: str) -> None:
    made, unfinished = make(storage, "a", "patch", {}, work=30), cut_off(storage, "a", "pairs")
    plan = plan_removal(one(storage), whole=False, force=False)
    assert plan.bytes == 30
    assert plan.kept == "1 unfinished (--force removes them)"
    remove(plan)
    again = make(storage, "a", "patch", {}, work=30)
    assert again.reused  # and its files match their hashes
    assert not (made.path / "work").exists()
    assert (unfinished / "work" / "part").exists()


def test_a_whole_run_goes_but_for_what_is_unfinished(storage: str) -> None:
    make(storage, "a", "patch", {})
    unfinished = cut_off(storage, "a", "pairs")
    remove(plan_removal(one(storage), whole=True, force=False))
    run = one(storage)
    assert [stage.stage for stage in run.stages] == ["pairs"]
    assert (unfinished / "work" / "part").exists()
    remove(plan_removal(run, whole=True, force=True))
    assert not any(found.name == "a" for found in find_runs(storage))


def test_a_run_with_a_driver_is_left_alone(storage: str) -> None:
    make(storage, "a", "patch", {}, work=30)
    planned = plan_removal(one(storage), whole=True, force=True)
    with sole_driver(Run(storage, "a").root):
        plan = plan_removal(one(storage), whole=True, force=True)
        assert plan.paths == ()
        assert plan.kept.startswith(f"in use by process {os.getpid()}")
        with pytest.raises(ResourceError, match="has a driver already"):
            remove(planned)  # planned before that driver came
    assert one(storage).bytes > 100


def test_a_lost_hosts_run_is_not_running_and_may_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an object store, whose record outlives its driver."""
    monkeypatch.setattr(driver_lock, "WATCH_SECONDS", 0.2)
    storage, month = f"memory://lost-{time.monotonic_ns()}", time.time() - 30 * 86400
    made = make(storage, "a", "patch", {})
    lost = Driver.here().model_copy(update={"host": "lost", "since": month, "seen": month})
    (made.path.parent.parent / driver_lock.RECORD).write_text(lost.model_dump_json())
    run = one(storage)
    assert (run.state, run.driver) == ("finished", None)
    told = RunProgress(host="lost", process=1, updated=month, stages=[])
    (run.path / progress_file.FILE).write_text(told.model_dump_json())
    assert one(storage).state == "killed"
    remove(plan_removal(one(storage), whole=True, force=True))
    assert find_runs(storage) == []


def test_a_local_driver_need_not_say_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(str(tmp_path), "a", "patch", {})
    with sole_driver(Run(str(tmp_path), "a").root):
        monkeypatch.setattr(Driver, "silent", lambda self: True)
        assert one(str(tmp_path)).state == "running"


def test_an_unfinished_search_keeps_the_trials_that_it_may_go_on_from(storage: str) -> None:
    make(storage, "a", "patch", {}, work=30)
    folder = cut_off(storage, "a", "search")
    plan = plan_removal(one(storage), whole=False, force=False)
    assert plan.paths == ()
    assert "unfinished search" in plan.kept
    (folder / "report.html").write_text("the last file of a search")
    assert plan_removal(one(storage), whole=False, force=False).bytes == 30 + 10


def test_a_storage_that_refuses_a_removal_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = f"memory://refusing-{time.monotonic_ns()}"
    make(storage, "a", "patch", {}, work=30)
    planned = plan_removal(one(storage), whole=False, force=False)

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("AccessDenied")

    monkeypatch.setattr(type(planned.paths[0].fs), "rm", refuse)
    with pytest.raises(ResourceError, match=r"cannot be used \(RuntimeError: AccessDenied\)"):
        remove(planned)


@pytest.mark.parametrize(
    ("storage", "said"),
    [("/nowhere/at/all", "no runs in /nowhere/at/all/runs"), ("nope://x", "no such storage")],
)
def test_no_such_storage(storage: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        find_runs(storage)


def test_an_unknown_run_names_its_neighbour(storage: str) -> None:
    make(storage, "demo-int2", "patch", {})
    with pytest.raises(DataError, match="no run named 'demo': did you mean demo-int2"):
        one(storage, "demo")
    with pytest.raises(DataError, match="no run named"):
        one(storage, "../../etc")


def test_a_manifest_that_cannot_be_read_is_not_one_that_is_damaged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = make("memory://manifests", "a", "quantize", {"bits": 4})
    (stage,) = one("memory://manifests").stages
    assert stage.manifest().spec == {"bits": 4}
    (made.path / "manifest.json").write_text("{")
    with pytest.raises(CorruptArtifactError, match="unreadable manifest"):
        stage.manifest()
    (made.path / "manifest.json").unlink()
    with pytest.raises(CorruptArtifactError, match="unreadable manifest"):
        stage.manifest()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")  # what s3fs makes of it

    monkeypatch.setattr(type(stage.path.fs), "_open", refuse)
    with pytest.raises(ResourceError, match=r"cannot be used \(PermissionError: Access Denied\)"):
        stage.manifest()
