"""Round to nearest, against llm-compressor's own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from qresafe.errors import ModelError
from qresafe.hf.checkpoint import QuantizedCheckpoint
from qresafe.hf.models import load_model
from qresafe.quantize_specs import RtnSpec
from qresafe.quantizers.rtn import quantize

PRESETS = {
    "W4A16": RtnSpec(bits=4, group_size=128, symmetric=True),
    "W4A16_ASYM": RtnSpec(bits=4, group_size=128, symmetric=False),
    "W8A16": RtnSpec(bits=8, group_size=128, symmetric=True),
}


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from conftest import save_tiny_llama

    return save_tiny_llama(tmp_path_factory.mktemp("wide"), hidden=128)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_files_equal_llm_compressors(wide_llama: Path, tmp_path: Path, preset: str) -> None:
    llmcompressor = pytest.importorskip("llmcompressor")
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = load_model(wide_llama)
    recipe = QuantizationModifier(targets="Linear", scheme=preset, ignore=["lm_head"])
    llmcompressor.oneshot(model=model, recipe=recipe)
    model.save_pretrained(tmp_path / "theirs", save_compressed=True)
    quantize(wide_llama, tmp_path, PRESETS[preset])
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    ours = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), name
    # and what they wrote is read by our codec
    read, mine = (QuantizedCheckpoint.open(tmp_path / n) for n in ("theirs", "checkpoint"))
    assert all(torch.equal(read.read(n).codes, mine.read(n).codes) for n in mine.names)


def test_the_same_call_gives_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        quantize(tiny_llama, tmp_path / name, RtnSpec(bits=3))
    files = [tmp_path / n / "checkpoint" / "model.safetensors" for n in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_group_size_that_does_not_fit_names_those_that_do(
    tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"64 inputs of .* group_size 48 .* 32 or 16 or -1"):
        quantize(tiny_llama, tmp_path, RtnSpec(group_size=48))
    with pytest.raises(ValidationError, match="1 or more weights"):
        quantize(tiny_llama, tmp_path, RtnSpec(group_size=0))
    assert not any(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_llama, tmp_path / "w"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj has weights that are not"):
        quantize(source, tmp_path / "q", RtnSpec())
