"""Artefacts: a stage runs once, continues after a kill, and is never half there."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from upath import UPath

from qresafe import integrity
from qresafe.artifacts import (
    Artifact,
    Run,
    content_key,
    disk_errors,
    hash_folder,
    new_file,
    read_manifest,
    stage_key,
    write_bytes,
    write_text,
)
from qresafe.errors import CorruptArtifactError, ResourceError
from qresafe.leftovers import sweep
from qresafe.storage import children


class Work:
    """Writes a number, and remembers how often it was asked to."""

    def __init__(self, number: int = 1, fail: Exception | None = None) -> None:
        self.number, self.fail, self.calls = number, fail, 0

    def __call__(self, folder: UPath) -> Mapping[str, Any]:
        self.calls += 1
        write_text(folder / "number.txt", str(self.number))
        if self.fail:
            raise self.fail
        return {"numbers": 1}


def run_stage(run: Run, work: Work, **changed: Any) -> Artifact:
    given: dict[str, Any] = {
        "spec": {"tau": 0.6},
        "inputs": {"q0": "abc"},
        "code_version": 1,
    }
    return run.stage("patch", **(given | changed), work=work)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(str(tmp_path), "test")


def test_a_stage_runs_once(run: Run) -> None:
    work = Work()
    first, second = run_stage(run, work), run_stage(run, work)
    assert (work.calls, first.reused, second.reused) == (1, False, True)
    assert first.path == second.path
    assert second.manifest == first.manifest
    assert first.manifest.counts == {"numbers": 1}


def test_results_live_under_storage_runs_name_stage_key(run: Run, tmp_path: Path) -> None:
    made = run_stage(run, Work())
    assert Path(str(made.path)) == tmp_path / "runs" / "test" / "patch" / made.key


@pytest.mark.parametrize(
    "changed", [{"spec": {"tau": 0.5}}, {"inputs": {"q0": "abd"}}, {"code_version": 2}]
)
def test_a_changed_input_gives_another_result(run: Run, changed: dict[str, Any]) -> None:
    work = Work()
    assert run_stage(run, work).key != run_stage(run, work, **changed).key
    assert work.calls == 2


def test_the_order_of_keys_does_not_matter() -> None:
    ab, ba = {"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 3, "c": 2}, "a": 1}
    assert stage_key("s", ab, {"x": "1", "y": "2"}, 1) == stage_key(
        "s", ba, {"y": "2", "x": "1"}, 1
    )
    assert content_key([1, 2]) != content_key([2, 1])


def test_a_key_is_the_same_in_another_process() -> None:
    code = "from qresafe.artifacts import stage_key; print(stage_key('s', {'a': [1.5]}, {}, 1))"
    keys = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert keys == {stage_key("s", {"a": [1.5]}, {}, 1)}


def test_a_failed_stage_is_not_done_and_finds_its_files_again(run: Run) -> None:
    with pytest.raises(RuntimeError, match="half-way"):
        run_stage(run, Work(fail=RuntimeError("half-way")))
    seen: list[str] = []

    def again(folder: UPath) -> Mapping[str, Any]:
        seen.append((folder / "number.txt").read_text())
        return {}

    made = run.stage("patch", spec={"tau": 0.6}, inputs={"q0": "abc"}, code_version=1, work=again)
    assert seen == ["1"]
    assert not made.reused


def test_a_killed_process_leaves_no_done_mark(run: Run, tmp_path: Path) -> None:
    code = f"""
import os
from qresafe.artifacts import Run, write_text
def work(folder):
    write_text(folder / "part-0", "kept")
    os.kill(os.getpid(), 9)
Run({str(tmp_path)!r}, "test").stage("s", spec={{}}, inputs={{}}, code_version=1, work=work)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    folder = run.folder("s", stage_key("s", {}, {}, 1))
    assert (folder / "part-0").read_text() == "kept"
    assert not (folder / "DONE").exists()
    assert not (folder / "manifest.json").exists()
    made = run.stage("s", spec={}, inputs={}, code_version=1, work=lambda folder: {})
    assert list(made.manifest.files) == ["part-0"]


def test_the_manifest_explains_the_result(run: Run) -> None:
    made = run_stage(run, Work())
    manifest = json.loads((made.path / "manifest.json").read_text())
    assert manifest["spec"] == {"tau": 0.6}
    assert manifest["inputs"] == {"q0": "abc"}
    assert manifest["files"] == {"number.txt": hashlib.sha256(b"1").hexdigest()}
    assert {"python", "torch", "qresafe"} <= set(manifest["versions"])
    assert manifest["hardware"]["cpus"] == os.cpu_count()


def test_versions_are_read_without_importing() -> None:
    code = (
        "import sys; from qresafe.provenance import versions; versions();"
        "print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_work_files_and_torn_writes_are_not_part_of_the_result(tmp_path: Path) -> None:
    for name in ("a", "work/part-0", "b.tmp-17", "DONE", "manifest.json", "sub/c"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    assert list(hash_folder(UPath(tmp_path))) == ["a", "sub/c"]


def test_only_what_dead_processes_of_this_host_left_is_swept(tmp_path: Path) -> None:
    here = socket.gethostname()
    kept = {
        "table",
        "table.tmp-old",
        "table.tmp-1-1-elsewhere",
        f"table.tmp-{os.getpid()}-1-{here}",
    }
    for name in [*kept, f"table.tmp-{dead_process()}-1-{here}"]:
        (tmp_path / name).touch()
    (tmp_path / f"folder.tmp-{dead_process()}-1-{here}" / "inside").mkdir(parents=True)
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_a_finished_stage_holds_no_half_written_files(run: Run) -> None:
    left = f"table.tmp-{dead_process()}-1-{socket.gethostname()}"

    def work(folder: UPath) -> dict[str, int]:
        (folder / left).write_text("half")
        return {}

    made = run.stage("s", spec={}, inputs={}, code_version=1, work=work)
    assert sorted(path.name for path in made.path.iterdir()) == ["DONE", "manifest.json"]


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda file: file.unlink(), "missing file number.txt"),
        (lambda file: file.write_text(""), "cut off file number.txt"),
        (lambda file: file.write_text("0"), "changed file number.txt"),
        (lambda file: file.write_text("10"), "changed file number.txt"),
        (lambda file: file.with_name("manifest.json").unlink(), "unreadable manifest"),
        (lambda file: file.with_name("DONE").write_text(""), "changed file manifest.json or DONE"),
    ],
)
def test_a_damaged_result_is_named_and_made_again(
    run: Run, harm: Callable[[UPath], object], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = run_stage(run, Work())
    harm(made.path / "number.txt")
    with pytest.raises(CorruptArtifactError, match=rf"{words}.*delete .* and run again"):
        read_manifest(made.path)
    work = Work()
    again = run_stage(run, work)
    assert (work.calls, again.reused) == (1, False)
    assert (again.path / "number.txt").read_text() == "1"
    assert again.manifest.files == made.manifest.files
    assert words in again.manifest.remade
    assert f"{words} in {made.path}: the patch stage is run again" in caplog.text
    assert run_stage(run, Work()).reused


def test_a_manifest_that_still_reads_but_says_something_else_is_found(run: Run) -> None:
    made = run_stage(run, Work())
    manifest = made.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"numbers": 1', '"numbers": 3'))  # one bit
    again = run_stage(run, Work())
    assert not again.reused
    assert again.manifest.counts == {"numbers": 1}


def test_a_result_of_an_earlier_version_is_still_good(run: Run) -> None:
    made = run_stage(run, Work())
    (made.path / "DONE").write_text(made.key)
    assert run_stage(run, Work()).reused


def test_what_comes_out_otherwise_the_second_time_is_told(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    made = run_stage(run, Work())
    (made.path / "number.txt").unlink()
    run_stage(run, Work(number=2))
    assert f"{made.path} has other bytes than before in number.txt" in caplog.text


def test_nothing_damaged_stays_but_parts_which_are_checked_one_by_one(run: Run) -> None:
    def work(folder: UPath) -> Mapping[str, Any]:
        (folder / "work").mkdir(exist_ok=True)
        seen.append(sorted(path.name for path in folder.rglob("*") if path.is_file()))
        for name in ("a", "b", "work/part"):
            write_text(folder / name, name)
        return {}

    seen: list[list[str]] = []
    for _ in range(2):
        made = run.stage("s", spec={}, inputs={}, code_version=1, work=work)
        (made.path / "a").unlink()
    assert seen == [[], ["part"]]


def test_a_file_is_hashed_once_by_a_process_unless_it_was_written_since(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, hashed = run_stage(run, Work()), list[str]()
    real = integrity.hash_file

    def counted(path: UPath | Path) -> str:
        hashed.append(Path(path).name)
        return real(path)

    monkeypatch.setattr(integrity, "hash_file", counted)
    for _ in range(3):
        read_manifest(made.path)
    assert hashed == ["number.txt"]
    (made.path / "number.txt").write_text("1")
    read_manifest(made.path)
    assert hashed == ["number.txt"] * 2


@pytest.mark.parametrize("damage", ["", "{", '{"stage": 3}'])
def test_a_damaged_manifest_is_found(run: Run, damage: str) -> None:
    made = run_stage(run, Work())
    (made.path / "manifest.json").write_text(damage)
    with pytest.raises(CorruptArtifactError, match="unreadable manifest"):
        read_manifest(made.path)


def test_any_fsspec_storage_will_do() -> None:
    run = Run("memory://bucket", "test")
    work = Work()
    made = run_stage(run, work)
    assert run_stage(run, work).reused
    assert (made.path / "number.txt").read_text() == "1"
    assert made.manifest.files == {"number.txt": hashlib.sha256(b"1").hexdigest()}


def test_a_reader_sees_all_of_a_file_or_nothing(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"old")
    write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("number", "words"), [(28, "disk is full"), (13, "cannot write"), (30, "cannot write")]
)
def test_disk_errors_are_one_sentence(number: int, words: str) -> None:
    with pytest.raises(ResourceError, match=words), disk_errors("/somewhere"):
        raise OSError(number, "x")


def test_other_os_errors_stay_what_they_are() -> None:
    with pytest.raises(FileNotFoundError), disk_errors("/somewhere"):
        raise FileNotFoundError(2, "x")


def test_a_storage_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for storage in (str(tmp_path / "file"), "/proc/x"):
        with pytest.raises(ResourceError, match="cannot write"):
            Run(storage, "r").check()


def test_a_remote_storage_that_refuses_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients of object stores raise classes of their own, such as botocore's."""

    class NoKeys(Exception):
        pass

    def refuse(*_: object, **__: object) -> None:
        raise NoKeys("unable to locate\ncredentials")

    run = Run("memory://refusing", "r")
    monkeypatch.setattr(type(run.root.fs), "_open", refuse)
    with pytest.raises(ResourceError, match=r"NoKeys: unable to locate credentials\) in memory:"):
        run.check()


@pytest.mark.parametrize("root", ["memory://listed", ""])
def test_a_folder_that_is_not_there_has_no_children(root: str, tmp_path: Path) -> None:
    folder = UPath(root or tmp_path) / "work"
    assert children(folder) == []
    for name in ("b", "a"):
        write_text(folder / name, "") if root else (folder / name).mkdir(parents=True)
    assert [path.name for path in children(folder)] == ["a", "b"]


@pytest.mark.parametrize("remote", [False, True])
def test_a_new_file_appears_when_it_is_whole(tmp_path: Path, remote: bool) -> None:
    folder = UPath("memory://new-files") if remote else UPath(tmp_path)
    folder.mkdir(exist_ok=True)
    path = folder / "big"
    with new_file(path) as made:
        made.write_bytes(b"1234")
        assert not path.exists()
    assert path.read_bytes() == b"1234"

    def on_a_full_disk() -> None:
        with new_file(path) as made:
            made.write_bytes(b"12")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        on_a_full_disk()
    assert path.read_bytes() == b"1234"
    assert [file.name for file in folder.iterdir()] == ["big"]
