"""Damaged files of finished and half-finished runs: named, made again, and never used."""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from upath import UPath

from bench.fault_kinds import damage
from qresafe.presets import load_experiment
from qresafe.search_spec import Search
from qresafe.specs import ExperimentSpec
from qresafe.stages import patch_state
from qresafe.stages.experiment import Experiment
from qresafe.stages.patch_loop import PatchLoop, train_patch
from qresafe.stages.runtime import InProcessRuntime
from qresafe.stages.search.ledger import Ledger, Row
from qresafe.stages.train_engine import LocalEngine
from tests.patching import patch_inputs, patch_spec
from tests.searching import make_search

TIMED = {"manifest.json", "DONE", "history.jsonl"}
SETTINGS = [
    "control=false",
    "quantize={method: rtn, bits: 4, group_size: 32}",
    "pairs={harmful: 4, benign: 4, borderline: 4, recombined: 4, max_new_tokens: 4, "
    "keep: different}",
    "patch.steps=4",
    "patch.checkpoint_every=1",
    "patch.rank=4",
    "evaluate.generate={max_new_tokens: 4, batch_size: 4}",
]


def run(spec: ExperimentSpec) -> Path:
    """Run an experiment to its comparison in this process; return the run's folder."""
    experiment = Experiment(spec, InProcessRuntime(threads=1))
    assert experiment.comparison
    return Path(str(experiment.run.root))


def results(root: Path) -> dict[str, bytes]:
    """Return what must not depend on damage: all results but times."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
        and path.name not in TIMED
        and not {"work", "logs"} & set(path.relative_to(root).parts)  # a log tells of every try
    }


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The last bits of a matrix product depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A finished run; tests work on copies."""
    storage = tmp_path_factory.mktemp("finished")
    return run(spec_on(storage, tiny_llama))


def spec_on(storage: Path, model: Path) -> ExperimentSpec:
    own = [f"storage={storage}", f"model.path={model}", "name=r"]
    return load_experiment("cpu-smoke", [*SETTINGS, *own])


def copied(finished: Path, storage: Path) -> Path:
    return Path(shutil.copytree(finished, storage / "runs" / "r"))


def one_of_each_kind(root: Path) -> list[Path]:
    """Return one result of each stage and kind of file, and of each stage its two marks."""
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(root.glob("*/*/**/*")):
        stage, _, *inside = path.relative_to(root).parts
        if path.is_file() and "work" not in inside:
            kind = path.name if path.name in TIMED else path.suffix
            found.setdefault((stage, kind), path)
    return list(found.values())


def test_every_kind_of_file_of_a_finished_run(
    finished: Path, tmp_path: Path, tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, expected = copied(finished, tmp_path), results(finished)
    spec, draw = spec_on(tmp_path, tiny_llama), random.Random(0)
    files = one_of_each_kind(root)
    kinds = {file.suffix for file in files}
    assert {".parquet", ".safetensors", ".json", ".jsonl", ".qpatch", ""} <= kinds
    by_stage: dict[str, list[Path]] = {}
    for file in files:
        by_stage.setdefault(file.relative_to(root).parts[0], []).append(file)
    for number, turn in enumerate(itertools.zip_longest(*by_stage.values())):  # one of each stage
        together = [file for file in turn if file]
        caplog.clear()
        for file in together:
            damage(file, ("flip", "cut")[number % 2], draw)
        assert run(spec) == root
        for file in together:
            folder = root.joinpath(*file.relative_to(root).parts[:2])
            assert f"{folder}: the " in caplog.text, file
        assert results(root) == expected


def test_parts_of_a_half_finished_stage(
    finished: Path, tmp_path: Path, tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, draw = copied(finished, tmp_path), random.Random(1)
    harmed = []
    for folder in root.glob("generate/*"):
        parts = sorted((folder / "work" / "parts").iterdir())
        assert len(parts) >= 3
        parts[0].unlink()  # not computed yet
        damage(parts[1], "flip", draw)
        damage(parts[2], "cut", draw)
        harmed += parts[1:3]
        for name in ("DONE", "manifest.json", "completions.parquet"):
            (folder / name).unlink()
    run(spec_on(tmp_path, tiny_llama))
    assert results(root) == results(finished)
    assert all(f"damaged file {part}" in caplog.text for part in harmed)


# ---------------------------------------------------------------- checkpoints

HARM = [("flip", "state.safetensors"), ("cut", "state.safetensors"), ("flip", "meta.json")]


def cut_off_training(folder: UPath) -> None:
    """Train the tiny Q0 for 7 of 8 steps, with a checkpoint after each second one."""
    spec = patch_spec(checkpoint_every=2)
    loop = PatchLoop(LocalEngine(), patch_inputs(spec), spec)
    while loop.step < 7:
        loop.advance()
        if loop.step % 2 == 0:
            loop.save(folder)


def trained(folder: UPath) -> dict[str, bytes]:
    spec = patch_spec(checkpoint_every=2)
    train_patch(LocalEngine(), patch_inputs(spec), spec, folder, Notes())
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix[1:2] == "s"}


class Notes:
    def start(self, stage: str, total: int | None = None, unit: str = "") -> None:
        pass

    def advance(self, done: int = 1, note: str = "") -> None:
        pass

    def finish(self, note: str = "", reused: bool = False) -> None:
        pass


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return trained(UPath(tmp_path_factory.mktemp("undisturbed")))


@pytest.mark.parametrize(("deed", "name"), HARM)
def test_the_checkpoint_before_a_damaged_one_is_used(
    tmp_path: Path,
    undisturbed: dict[str, bytes],
    deed: str,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = UPath(tmp_path)
    cut_off_training(folder)
    newest = tmp_path / patch_state.FOLDER / "00000006"
    damage(newest / name, deed, random.Random(2))
    found = patch_state.load(folder, torch.device("cpu"))
    assert found
    assert found[1]["step"] == 4
    assert f"damaged checkpoint {newest}" in caplog.text
    assert trained(folder) == undisturbed


def test_with_all_checkpoints_damaged_training_begins_anew(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    folder = UPath(tmp_path)
    cut_off_training(folder)
    for place in (tmp_path / patch_state.FOLDER).iterdir():
        damage(place / "state.safetensors", "flip", random.Random(3))
    assert patch_state.load(folder, torch.device("cpu")) is None
    assert trained(folder) == undisturbed


# ---------------------------------------------------------------- rows of a search


@pytest.mark.parametrize("deed", ["flip", "cut"])
def test_a_trial_whose_row_is_damaged_is_run_again(
    tmp_path: Path, deed: str, caplog: pytest.LogCaptureFixture
) -> None:
    search: Search = make_search(tmp_path)
    ledger = Ledger(UPath(tmp_path / search.spec.name))
    rows = [Row(index=i, params={"a": i}, status="completed", metrics={"m": 0.5}) for i in range(3)]
    for row in rows:
        ledger.write(row)
    assert ledger.read() == dict(enumerate(rows))
    file = tmp_path / search.spec.name / "trials" / "00001.json"
    damage(file, deed, random.Random(4))
    assert ledger.read() == {0: rows[0], 2: rows[2]}
    assert f"damaged file {file}: its trial is run again" in caplog.text
