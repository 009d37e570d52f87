"""Safetensors written tensor by tensor: the bytes of the library's own writer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qresafe.hf.shards import ORDER, tensor_writer, write_shards
from qresafe.hf.tensor_files import DTYPES, TensorFiles


def tensors() -> dict[str, torch.Tensor]:
    """Return tensors of every type, names out of order, some of them empty or views."""
    draw = torch.Generator().manual_seed(0)
    made = {}
    for number, dtype in enumerate(DTYPES.values()):
        for name, shape in (("b", (3, 5)), ("a", (7,)), ('é"', ()), ("none", (0, 4))):
            value = 40 * torch.randn(shape, generator=draw)
            made[f"{name}.{number % 3}.{number}"] = value.to(dtype)
    return made


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_bytes_are_safetensors_own(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    given = tensors()
    with tensor_writer(tmp_path / "ours", metadata) as add:
        for name, value in given.items():
            add(name, value)
    save_file(given, tmp_path / "theirs", metadata=metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert len(ORDER) == len(DTYPES)


def test_views_are_stored_as_what_they_show(tmp_path: Path) -> None:
    value = torch.arange(12).view(3, 4)
    with tensor_writer(tmp_path / "ours") as add:
        add("across", value.T)
    assert torch.equal(load_file(tmp_path / "ours")["across"], value.T)


def test_shards_stay_shards(tmp_path: Path) -> None:
    source, target = tmp_path / "w", tmp_path / "q"
    source.mkdir()
    target.mkdir()
    parts = {
        "model-1.safetensors": {"a": torch.ones(4)},
        "model-2.safetensors": {"b": torch.ones(2)},
    }
    for file, part in parts.items():
        save_file(part, source / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    files = TensorFiles(source)
    write_shards(
        target, files, lambda name: {f"{name}.x": files[name], f"{name}.y": files[name].half()}
    )
    first, second = parts
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * 4 + 4 * 2 + 2 * 4 + 2 * 2
    assert index["weight_map"] == {"a.x": first, "a.y": first, "b.x": second, "b.y": second}
    assert sorted(load_file(target / second)) == ["b.x", "b.y"]
