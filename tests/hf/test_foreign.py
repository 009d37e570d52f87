"""Checkpoints of AutoGPTQ, GPTQModel and AutoAWQ: read as their libraries do, patched in place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from foreign import packed_rows, write_awq, write_gptq
from safetensors.torch import save_file

from qresafe.core.permuted import PermutedGrid
from qresafe.errors import CorruptArtifactError, ModelError
from qresafe.hf.checkpoint import QuantizedCheckpoint, load_dense
from qresafe.hf.formats.bits import pack_words, unpack_words
from qresafe.hf.models import load_model
from qresafe.hf.tensor_files import TensorFiles
from qresafe.hf.writing import write_dense

IDS = torch.arange(10, 40)[None]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [32, 33, 64, 7])
def test_words_hold_one_long_number(bits: int, count: int) -> None:
    codes = torch.randint(0, 1 << bits, (count, 3), generator=torch.Generator().manual_seed(0))
    packed = pack_words(codes, bits)
    assert torch.equal(packed, packed_rows(codes, bits))
    assert torch.equal(unpack_words(packed, bits, count).long(), codes)


@pytest.mark.parametrize("packing", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_read_and_packed_as_written(
    tiny_llama: Path, tmp_path: Path, bits: int, desc_act: bool, packing: str
) -> None:
    expected = write_gptq(tmp_path / "q", tiny_llama, bits=bits, desc_act=desc_act, packing=packing)
    checkpoint = QuantizedCheckpoint.open(tmp_path / "q")
    assert set(checkpoint.names) == set(expected)
    for name, weight in expected.items():
        tensor = checkpoint.read(name)
        assert isinstance(tensor.grid, PermutedGrid) == desc_act
        assert torch.equal(tensor.dense(), weight)
        assert torch.equal(tensor.grid.encode(weight), tensor.codes)
        stored, packed = checkpoint.codec.pack(name, tensor.codes)
        assert torch.equal(packed, checkpoint.files[stored])


def test_awq_is_read_as_compressed_tensors_converts_it(tiny_llama: Path, tmp_path: Path) -> None:
    expected = write_awq(tmp_path / "q", tiny_llama)
    checkpoint = QuantizedCheckpoint.open(tmp_path / "q")
    files = checkpoint.files
    converter = AutoAWQConverter(bits=4, group_size=32)
    for name, weight in expected.items():
        tensor = checkpoint.read(name)
        parts = (files[f"{name}.{part}"] for part in ("qweight", "scales", "qzeros"))
        codes, scale, zero = converter._convert_gemm_module(*parts)
        assert torch.equal(tensor.codes, codes.to(torch.int8))
        assert torch.equal(tensor.grid.scale, scale)  # type: ignore[attr-defined]
        assert torch.equal(tensor.grid.zero, zero.to(torch.int8))  # type: ignore[attr-defined]
        assert torch.equal(tensor.dense(), weight)
        assert torch.equal(tensor.grid.encode(weight), tensor.codes)
        assert torch.equal(checkpoint.codec.pack(name, codes)[1], files[f"{name}.qweight"])


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_patched_copy_differs_in_its_codes_alone(
    tiny_llama: Path, tmp_path: Path, method: str
) -> None:
    if method == "gptq":
        write_gptq(tmp_path / "q0", tiny_llama, bits=3, desc_act=True)
    else:
        write_awq(tmp_path / "q0", tiny_llama)
    q0 = QuantizedCheckpoint.open(tmp_path / "q0")
    codes = {n: -1 - q0.read(n).codes for n in q0.names[::2]}
    made = q0.rewrite(tmp_path / "q", codes)
    q = QuantizedCheckpoint.open(made)
    for name in q.files:
        changed = name.removesuffix(".qweight") in codes and name.endswith("qweight")
        assert torch.equal(q.files[name], q0.files[name]) != changed
    assert all(torch.equal(q.read(n).codes, codes[n]) for n in codes)
    assert [f.stat().st_size for f in sorted(made.iterdir())] == [
        f.stat().st_size for f in sorted(q0.folder.iterdir())
    ]


@torch.no_grad()
def test_without_its_library_a_model_runs_with_decoded_weights(
    tiny_llama: Path, tmp_path: Path
) -> None:
    expected = write_gptq(tmp_path / "q", tiny_llama)
    with pytest.warns(UserWarning, match="gptqmodel and optimum are not installed"):
        model = load_model(tmp_path / "q", dtype="float32")
    assert model.dtype == torch.float32
    for name, weight in expected.items():
        assert torch.equal(model.get_submodule(name).weight, weight.float())
    dense, _ = load_dense(tmp_path / "q", torch.float32)
    assert torch.equal(model(IDS).logits, dense(IDS).logits)
    write_dense(tmp_path / "plain", QuantizedCheckpoint.open(tmp_path / "q"), lambda _, w: w)
    plain = load_model(tmp_path / "plain", dtype="float32")
    assert torch.equal(plain(IDS).logits, dense(IDS).logits)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"checkpoint_format": "marlin"}, "packed as 'marlin'"),
        ({"is_marlin_format": True}, "packed as 'marlin'"),
        ({"bits": 5}, "of 5 bits"),
        ({"quant_method": "awq", "version": "gemv"}, "version 'gemv'"),
        ({"quant_method": "awq", "version": "gemm", "bits": 8}, "8 bits"),
        ({"quant_method": "exl2"}, "'exl2' is not supported"),
    ],
)
def test_other_packings_are_named(
    tiny_llama: Path, tmp_path: Path, config: dict[str, object], message: str
) -> None:
    write_gptq(tmp_path / "q", tiny_llama)
    stored = json.loads((tmp_path / "q" / "config.json").read_text())
    stored["quantization_config"] |= config
    (tmp_path / "q" / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ModelError, match=message):
        QuantizedCheckpoint.open(tmp_path / "q")


def test_parts_that_do_not_fit_are_found(tiny_llama: Path, tmp_path: Path) -> None:
    write_gptq(tmp_path / "q", tiny_llama)
    weights = tmp_path / "q" / "model.safetensors"
    tensors = dict(TensorFiles(tmp_path / "q"))
    name = next(n for n in tensors if n.endswith("scales"))
    save_file(tensors | {name: tensors[name][:1].contiguous()}, str(weights))
    layer = name.removesuffix(".scales")
    with pytest.raises(ModelError, match="does not fit"):
        QuantizedCheckpoint.open(tmp_path / "q").read(layer)
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CorruptArtifactError, match="damaged weight file"):
        QuantizedCheckpoint.open(tmp_path / "q")
