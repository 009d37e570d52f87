"""Folders from elsewhere: kept once, and not for another model that was put in their place."""

from __future__ import annotations

from pathlib import Path

import pytest
from upath import UPath

from qresafe.artifacts import Run
from qresafe.storage import local_folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QRESAFE_CACHE", str(tmp_path / "cache"))


def test_a_model_that_was_replaced_is_fetched_again(tmp_path: Path) -> None:
    """As by a CI job that writes every build's candidate to the same URL."""
    folder = UPath(f"memory://models{tmp_path}/candidate")
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"first build")
    first = local_folder(folder)
    assert local_folder(folder) == first
    (folder / "model.safetensors").write_bytes(b"other build")  # as long
    second = local_folder(folder)
    assert (second / "model.safetensors").read_bytes() == b"other build"
    assert (first / "model.safetensors").read_bytes() == b"first build"  # somebody may read it


def test_what_a_stage_has_made_is_known_by_its_place(tmp_path: Path) -> None:
    def work(folder: UPath) -> dict[str, int]:
        (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoint" / "weights").write_bytes(b"made")
        return {}

    run = Run(f"memory://runs{tmp_path}", "r")
    made = run.stage("quantize", spec={}, inputs={}, code_version=1, work=work)
    first = local_folder(made.path / "checkpoint")
    assert (first / "weights").read_bytes() == b"made"
    assert local_folder(made.path / "checkpoint") == first
