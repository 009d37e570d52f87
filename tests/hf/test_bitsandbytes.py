"""bitsandbytes checkpoints; the library's own de-quantization is the oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qresafe.hf.checkpoint import QuantizedCheckpoint, load_dense
from qresafe.hf.models import load_model
from qresafe.quantize_specs import BnbSpec
from qresafe.quantizers.bnb import quantize

functional = pytest.importorskip("bitsandbytes.functional")
IDS = torch.arange(10, 40)[None]

SPECS = [
    BnbSpec(format="nf4"),
    BnbSpec(format="nf4", double_quant=True),
    BnbSpec(format="fp4"),
    BnbSpec(format="fp4", double_quant=True),
    BnbSpec(format="int8"),
]


def oracle(layer: torch.nn.Module) -> torch.Tensor:
    weight = layer.weight
    if weight.dtype == torch.int8:
        return functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    return functional.dequantize_4bit(weight.data, weight.quant_state)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.format}{'-double' * s.double_quant}")
def test_decoding_equals_the_library(tiny_llama: Path, tmp_path: Path, spec: BnbSpec) -> None:
    result = quantize(tiny_llama, tmp_path, spec)
    assert result.counts == {"layers": 14}  # 7 projections in each of 2 blocks
    dense, layers = load_dense(tmp_path / "checkpoint")
    deployed = load_model(tmp_path / "checkpoint")
    # LLM.int8(): (code * SCB) / 127 against code * (SCB / 127), one rounding apart
    ulps = 2**-23 if spec.format == "int8" else 0.0
    for name, tensor in layers.items():
        expected = oracle(deployed.get_submodule(name))  # before any forward pass (AVX512-BF16)
        torch.testing.assert_close(tensor.dense(), expected, rtol=ulps, atol=0.0)
    if spec.format != "int8":  # it rounds activations too
        # With gradients on: without, bitsandbytes computes in bfloat16 on CPUs that have it.
        torch.testing.assert_close(deployed(IDS).logits, dense(IDS).logits)


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[4]], ids=["nf4", "int8"])
def test_rewritten_codes_are_the_ones_the_library_loads(
    tiny_llama: Path, tmp_path: Path, spec: BnbSpec
) -> None:
    quantize(tiny_llama, tmp_path, spec)
    checkpoint = QuantizedCheckpoint.open(tmp_path / "checkpoint")
    name = checkpoint.names[2]
    old = checkpoint.read(name)
    codes = old.codes.flip(0)
    checkpoint.rewrite(tmp_path / "q", {name: codes})
    layer = load_model(tmp_path / "q").get_submodule(name)
    torch.testing.assert_close(oracle(layer), old.grid.decode(codes), rtol=2**-23, atol=0.0)
