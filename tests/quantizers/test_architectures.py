"""Other architectures, randomly initialised: stored, decoded and deployed alike, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import save_tiny_tokenizer

from qresafe.errors import ModelError
from qresafe.hf.checkpoint import load_dense
from qresafe.hf.models import load_model
from qresafe.quantize_specs import AwqSpec, CalibrationSpec, Fp8Spec, GptqSpec, RtnSpec
from qresafe.quantizers.rtn import quantize
from qresafe.registry import quantizers

SIZES: dict[str, Any] = {
    "vocab_size": 262,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
CONFIGS: dict[str, tuple[dict[str, Any], int]] = {  # settings, quantized layers in two blocks
    "Qwen2Config": (GROUPED, 14),
    "Gemma2Config": (GROUPED | {"head_dim": 16}, 14),
    "MistralConfig": (GROUPED, 14),
    "Phi3Config": (GROUPED, 8),  # qkv, o, gate_up, down
    "GPTNeoXConfig": ({}, 8),  # qkv, dense, two of the MLP; embed_out is its lm_head
}


def save(name: str, settings: dict[str, Any], folder: Path) -> Path:
    save_tiny_tokenizer(folder)
    config = getattr(transformers, name)(**SIZES, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_stored_decoded_and_deployed_alike(tmp_path: Path, name: str) -> None:
    settings, layers = CONFIGS[name]
    source = save(name, settings, tmp_path / "w")
    assert quantize(source, tmp_path, RtnSpec(bits=4, group_size=32)).counts["layers"] == layers
    dense, _ = load_dense(tmp_path / "checkpoint")
    ids = torch.arange(10, 40)[None]
    deployed = load_model(tmp_path / "checkpoint")(ids).logits
    assert torch.equal(deployed, dense(ids).logits)
    assert not torch.equal(deployed, load_model(source)(ids).logits)


FEW: dict[str, Any] = {"calibration": CalibrationSpec(risk="I", benign=2), "max_length": 32}
CALIBRATED = [
    GptqSpec(bits=8, group_size=32, **FEW),
    AwqSpec(bits=8, group_size=32, **FEW),
    Fp8Spec(activations="none"),
]


@pytest.mark.parametrize("spec", CALIBRATED, ids=lambda s: s.method)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_eight_calibrated_bits_stay_near_the_model(
    tmp_path: Path, name: str, spec: GptqSpec | AwqSpec | Fp8Spec
) -> None:
    settings, layers = CONFIGS[name]
    source = save(name, settings, tmp_path / "w")
    method = quantizers.get(spec.method)
    if (name, spec.method) == ("GPTNeoXConfig", "awq"):
        with pytest.raises(ModelError, match=r"cannot quantize.*use quantize\.method: rtn"):
            method(source, tmp_path, spec)
        return
    assert method(source, tmp_path, spec).counts["layers"] == layers
    dense, _ = load_dense(tmp_path / "checkpoint")
    ids = torch.arange(10, 40)[None]
    deployed, exact = (load_model(f)(ids).logits for f in (tmp_path / "checkpoint", source))
    assert torch.equal(deployed, dense(ids).logits)
    # AWQ's folded scales must cancel, also in Gemma's norms, which multiply by 1 + weight.
    assert (deployed - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("MixtralConfig", GROUPED | {"num_local_experts": 2}, "experts.*method: bnb"),
        ("GPT2Config", {}, "no linear layer to quantize"),  # made of Conv1D
    ],
)
def test_what_the_format_cannot_hold_is_refused(
    tmp_path: Path, name: str, settings: dict[str, Any], message: str
) -> None:
    source = save(name, settings, tmp_path / "w")
    with pytest.raises(ModelError, match=message):
        quantize(source, tmp_path / "q", RtnSpec(group_size=32))
