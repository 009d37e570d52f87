"""AQLM layers as the `aqlm` package computes them, and where they run decoded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qresafe.errors import ModelError
from qresafe.hf.checkpoint import QuantizedCheckpoint
from qresafe.hf.decoded import decoded_because

CONFIG = {"quant_method": "aqlm", "in_group_size": 8, "out_group_size": 1, "num_codebooks": 2}


def stored_layer(
    folder: Path, bits: int, *, dtype: str = "float32", **changes: object
) -> dict[str, torch.Tensor]:
    """Write a checkpoint of one random layer (6, 16), packed by the package itself."""
    from aqlm.utils import pack_int_data

    draw = torch.Generator().manual_seed(bits)
    indices = torch.randint(1 << bits, (6, 2, 2), generator=draw)
    tensors = {
        "layer.codes": pack_int_data(indices.clone(), bits),
        "layer.codebooks": torch.randn(2, 1 << bits, 1, 8, generator=draw).half(),
        "layer.scales": torch.rand(6, 1, 1, 1, generator=draw).half(),
        "norm.weight": torch.ones(4),
    }
    scheme = CONFIG | {"nbits_per_codebook": bits} | changes
    config = {"model_type": "llama", "dtype": dtype, "quantization_config": scheme}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize("bits", [3, 8, 11, 16])
def test_layers_decode_as_the_package_decodes_them(tmp_path: Path, bits: int) -> None:
    from aqlm.utils import _dequantize_weight, unpack_int_data

    tensors = stored_layer(tmp_path, bits)
    codes, books, scales = (tensors[f"layer.{part}"] for part in ("codes", "codebooks", "scales"))
    indices = unpack_int_data(codes, bits)
    expected = _dequantize_weight(indices, books.float(), scales.float())
    checkpoint = QuantizedCheckpoint.open(tmp_path)
    layer = checkpoint.read("layer")
    assert torch.equal(layer.codes, codes)
    assert torch.equal(layer.dense(), expected)
    assert checkpoint.plain_names() == ["norm.weight"]


def test_a_rewrite_changes_codes_alone(tmp_path: Path) -> None:
    (tmp_path / "q0").mkdir()
    tensors = stored_layer(tmp_path / "q0", 16)
    checkpoint = QuantizedCheckpoint.open(tmp_path / "q0")
    codes = tensors["layer.codes"].clone()
    codes[3, 1] = torch.tensor([-32768, 32767], dtype=torch.int16)
    made = QuantizedCheckpoint.open(checkpoint.rewrite(tmp_path / "q", {"layer": codes}))
    assert torch.equal(made.read("layer").codes, codes)
    assert torch.equal(made.files["layer.codebooks"], tensors["layer.codebooks"])
    with pytest.raises(ModelError, match="outside"):
        checkpoint.rewrite(tmp_path / "no", {"layer": codes.int() + 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_group_size": 4}, "a code spans several outputs"),
        ({"nbits_per_codebook": "8"}, "not an integer from 1 to 16"),
        ({"nbits_per_codebook": 7}, "do not fit"),
    ],
)
def test_what_cannot_be_read_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    stored_layer(tmp_path, 8, **changes)
    with pytest.raises(ModelError, match=message):
        QuantizedCheckpoint.open(tmp_path).read("layer")


def test_only_on_a_cpu_aqlm_runs_decoded() -> None:
    config = {"quantization_config": CONFIG | {"nbits_per_codebook": 8}}
    assert "slow" in str(decoded_because(config, "cpu"))
    assert decoded_because(config, "cuda:0") is None
    assert decoded_because({}, "cpu") is None
