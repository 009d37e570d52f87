"""Codes on disk: read exactly as written, decoded as deployed, rewritten in place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from qresafe.core.grids import QuantizedTensor, fit_uniform
from qresafe.core.masked_lora import attach_frozen
from qresafe.errors import CorruptArtifactError, ModelError
from qresafe.hf.checkpoint import QuantizedCheckpoint, load_dense, load_frame
from qresafe.hf.models import load_model
from qresafe.hf.tensor_files import TensorFiles
from qresafe.hf.writing import Scheme, linear_layers, write_dense, write_quantized

IDS = torch.arange(10, 40)[None]


def write(source: Path, target: Path, scheme: Scheme) -> dict[str, QuantizedTensor]:
    files = TensorFiles(source)
    layers: dict[str, QuantizedTensor] = {}
    for name in linear_layers(source):
        if name != "lm_head":
            weight = files[f"{name}.weight"]
            grid = fit_uniform(weight, scheme.bits, scheme.group_size, scheme.symmetric)
            layers[name] = QuantizedTensor(grid, grid.encode(weight))
    write_quantized(target, source, layers, scheme)
    return layers


@pytest.fixture
def q0(tiny_llama: Path, tmp_path: Path) -> Path:
    write(tiny_llama, tmp_path / "q0", Scheme(4, 32, symmetric=False))
    return tmp_path / "q0"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@torch.no_grad()
def test_every_width_is_stored_exactly_and_deployed_as_decoded(
    tiny_llama: Path, tmp_path: Path, bits: int, group_size: int, symmetric: bool
) -> None:
    written = write(tiny_llama, tmp_path / "q0", Scheme(bits, group_size, symmetric))
    dense, read = load_dense(tmp_path / "q0")
    assert read.keys() == written.keys()
    for name, tensor in written.items():
        assert torch.equal(read[name].codes, tensor.codes)
        assert torch.equal(read[name].grid.scale, tensor.grid.scale)
        assert torch.equal(read[name].grid.zero, tensor.grid.zero)
        assert torch.equal(dense.get_submodule(name).weight, tensor.dense())
    deployed = load_model(tmp_path / "q0")
    assert torch.equal(deployed(IDS).logits, dense(IDS).logits)


def test_low_bits_take_little_room(tiny_llama: Path, tmp_path: Path) -> None:
    write(tiny_llama, tmp_path / "two", Scheme(2, -1, symmetric=True))
    write(tiny_llama, tmp_path / "eight", Scheme(8, -1, symmetric=True))
    size = {
        name: sum(
            TensorFiles(tmp_path / name)[key].nbytes
            for key in TensorFiles(tmp_path / name)
            if key.endswith("weight_packed")
        )
        for name in ("two", "eight")
    }
    assert size["eight"] == 4 * size["two"]


def test_a_decoded_model_stops_where_the_checkpoint_says(q0: Path, tmp_path: Path) -> None:
    """Chat models often end at several tokens, which only generation_config.json names."""
    folder = tmp_path / "ends"
    shutil.copytree(q0, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7, 9]}))
    model, _ = load_dense(folder)
    assert model.generation_config.eos_token_id == [2, 7, 9]


def test_the_dense_model_is_an_ordinary_one(q0: Path) -> None:
    model, _ = load_dense(q0, torch.bfloat16)
    assert not hasattr(model.config, "quantization_config")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    kinds = {type(module) for name, module in model.named_modules() if name.endswith("_proj")}
    assert kinds == {torch.nn.Linear}


@torch.no_grad()
def test_a_frame_takes_up_the_layers_and_computes_as_the_dense_model(q0: Path) -> None:
    dense, layers = load_dense(q0)
    frame, checkpoint = load_frame(q0)
    shells = [frame.get_submodule(name).weight for name in layers]
    assert {shell.untyped_storage().nbytes() for shell in shells} == {4}  # one zero
    assert [shell.shape for shell in shells] == [t.grid.shape for t in layers.values()]
    attach_frozen(frame, checkpoint)
    assert torch.equal(frame(IDS).logits, dense(IDS).logits)


def test_rewriting_changes_the_bytes_of_the_code_tensors_only(q0: Path, tmp_path: Path) -> None:
    checkpoint = QuantizedCheckpoint.open(q0)
    name = checkpoint.names[3]
    codes = checkpoint.read(name).codes.clone()
    codes[5, 7] = 7 if codes[5, 7] != 7 else -8
    made = checkpoint.rewrite(tmp_path / "q", {name: codes})
    for file in q0.iterdir():
        if file.suffix != ".safetensors":
            assert (made / file.name).read_bytes() == file.read_bytes()
    before = (q0 / "model.safetensors").read_bytes()
    after = (made / "model.safetensors").read_bytes()
    assert len(before) == len(after)
    differing = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    entry = checkpoint.files.entries[f"{name}.weight_packed"]
    # Row 5 of 64 codes takes 64 * 4 / 8 = 32 bytes; code 7 is in the high half of byte 3.
    assert differing == [entry.begin + 5 * 32 + 3]
    assert torch.equal(QuantizedCheckpoint.open(made).read(name).codes, codes)


def test_rewriting_goes_shard_by_shard(tiny_llama: Path, tmp_path: Path) -> None:
    load_model(tiny_llama).save_pretrained(tmp_path / "w", max_shard_size="60KB")
    for file in tiny_llama.glob("token*"):
        shutil.copyfile(file, tmp_path / "w" / file.name)
    write(tmp_path / "w", tmp_path / "q0", Scheme(4, 32, symmetric=True))
    assert len(list((tmp_path / "q0").glob("*.safetensors"))) > 2
    checkpoint = QuantizedCheckpoint.open(tmp_path / "q0")
    codes = {name: -1 - checkpoint.read(name).codes for name in checkpoint.names}
    made = checkpoint.rewrite(tmp_path / "q", codes)
    again = QuantizedCheckpoint.open(made)
    assert all(torch.equal(again.read(name).codes, codes[name]) for name in codes)
    assert torch.isfinite(load_model(made)(IDS).logits).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda codes: codes[:1], "not int"),
        (lambda codes: codes.float(), "not int"),
        (lambda codes: codes + 8, r"outside \[-8, 7\]"),
    ],
)
def test_codes_that_do_not_fit_leave_nothing_behind(q0, tmp_path, change, message) -> None:  # type: ignore[no-untyped-def]
    checkpoint = QuantizedCheckpoint.open(q0)
    name = checkpoint.names[0]
    with pytest.raises(ModelError, match=message):
        checkpoint.rewrite(tmp_path / "q", {name: change(checkpoint.read(name).codes)})
    with pytest.raises(ModelError, match="no quantized layer 'nope'"):
        checkpoint.rewrite(tmp_path / "q", {"nope": torch.zeros(1, 1, dtype=torch.int8)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q0"]


def test_decoded_weights_with_a_change_make_a_plain_model(q0: Path, tmp_path: Path) -> None:
    checkpoint = QuantizedCheckpoint.open(q0)
    first = checkpoint.names[0]
    write_dense(tmp_path / "d", checkpoint, lambda n, w: w + 1 if n == first else w)
    plain = load_model(tmp_path / "d")
    dense, layers = load_dense(q0)
    for name in layers:
        expected = dense.get_submodule(name).weight + (1 if name == first else 0)
        assert torch.equal(plain.get_submodule(name).weight, expected)


def test_a_plain_model_and_a_foreign_format_are_named(q0: Path, tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match="not quantized"):
        QuantizedCheckpoint.open(tiny_llama)
    config = json.loads((q0 / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "exl2"}
    (q0 / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"'exl2' is not supported.*compressed-tensors"):
        QuantizedCheckpoint.open(q0)


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_a_truncated_file_is_found(q0: Path, cut: int) -> None:
    weights = q0 / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:cut])
    with pytest.raises(CorruptArtifactError, match="damaged weight file"):
        QuantizedCheckpoint.open(q0)


def test_a_scheme_that_does_not_fit_the_tensors_is_found(q0: Path) -> None:
    config = json.loads((q0 / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 8
    (q0 / "config.json").write_text(json.dumps(config))
    checkpoint = QuantizedCheckpoint.open(q0)
    with pytest.raises(ModelError, match="does not fit"):
        checkpoint.read(checkpoint.names[0])
