"""Gradient checkpointing: the same patch to the byte, with less memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from upath import UPath

from qresafe.progress import Silent
from qresafe.stages.flip_loop import flip_codes
from qresafe.stages.patch import key_spec
from qresafe.stages.patch_loop import train_patch
from qresafe.stages.train_engine import LocalEngine
from tests.patching import flip_spec, patch_inputs, patch_spec

MASKS: list[dict[str, Any]] = [
    {"on": "weight"},
    {"on": "factors"},
    {"on": "weight", "loss": "dpo"},
    {"on": "weight", "score": "set_difference"},
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(spec: Any, folder: Path, train: Any = train_patch) -> dict[str, bytes]:
    train(LocalEngine(), patch_inputs(spec), spec, UPath(folder), Silent())
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("through_grid", [True, False])
def test_the_patch_is_the_same_to_the_byte(
    mask: dict[str, Any], through_grid: bool, tmp_path: Path
) -> None:
    spec = patch_spec(
        mask=mask | {"tau": 0.5, "remask_every": 2, "samples": 4},
        through_grid=through_grid,
        steps=4,
    )
    again = spec.model_copy(update={"gradient_checkpointing": True})
    plain = made(spec, tmp_path / "plain")
    assert len(plain) == 4
    assert made(again, tmp_path / "again") == plain
    assert key_spec(again) == key_spec(spec)  # so a finished patch is reused


def test_flips_are_the_same_to_the_byte(tmp_path: Path) -> None:
    spec = flip_spec()
    plain = made(spec, tmp_path / "plain", flip_codes)
    again = spec.model_copy(update={"gradient_checkpointing": True})
    assert made(again, tmp_path / "again", flip_codes) == plain
