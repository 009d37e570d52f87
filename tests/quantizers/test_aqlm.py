"""AQLM: quantized, stored, decoded and deployed alike; tuned blocks; refusals in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny_llama
from test_architectures import GROUPED, save
from transformers import AutoModelForCausalLM

from qresafe.embedded.calibration import calibration_chats
from qresafe.errors import ModelError
from qresafe.hf.chat import chat_ids
from qresafe.hf.checkpoint import QuantizedCheckpoint, load_dense
from qresafe.hf.models import load_model, load_tokenizer
from qresafe.quantize_specs import AqlmSpec, CalibrationSpec
from qresafe.quantizers.aqlm import quantize

FAST: dict[str, Any] = {
    "codebook_bits": 5,
    "calibration": CalibrationSpec(risk="I", benign=24),
    "rounds": 2,
    "finetune_steps": 4,
}


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aqlm")
    quantize(tiny_llama, folder, AqlmSpec(**FAST))
    return folder / "checkpoint"


def packages_own(checkpoint: Path) -> Any:
    """Return the model as plain transformers runs it, by the `aqlm` package's layers."""
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32").eval()


@torch.no_grad()
def test_the_deployed_model_computes_what_the_codes_decode_to(made: Path) -> None:
    dense, layers = load_dense(made)
    ids = torch.arange(10, 60)[None]
    assert torch.equal(packages_own(made)(ids).logits, dense(ids).logits)
    with pytest.warns(UserWarning, match="decoded weights"):  # as it is answered by on a CPU
        assert torch.equal(load_model(made)(ids).logits, dense(ids).logits)
    assert len(layers) == 14
    for tensor in layers.values():
        again = tensor.grid.encode(tensor.dense())
        torch.testing.assert_close(tensor.grid.decode(again), tensor.dense(), atol=1e-5, rtol=0)


def test_equal_calls_write_equal_bytes(tiny_llama: Path, made: Path, tmp_path: Path) -> None:
    quantize(tiny_llama, tmp_path, AqlmSpec(**FAST))
    for file in made.iterdir():
        assert (tmp_path / "checkpoint" / file.name).read_bytes() == file.read_bytes(), file.name


def test_bits_per_weight_count_all_that_is_stored(tiny_llama: Path, tmp_path: Path) -> None:
    counts = quantize(tiny_llama, tmp_path, AqlmSpec(**FAST)).counts
    # Two blocks alike: q, o 64x64, k, v 32x64, gate, up 128x64, down 64x128. Two int8 codes per
    # 8 weights, 2 x 32 x 8 float16 of codebooks a layer, one float16 scale a row.
    weights = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64
    rows = 2 * 64 + 2 * 32 + 2 * 128 + 64
    stored = weights // 8 * 2 + 7 * 2 * 32 * 8 * 2 + rows * 2
    assert counts["bits_per_weight"] == pytest.approx(8 * stored / weights)


def block_error(source: Path, made: Path) -> float:
    """Return the mean squared distance of the first block's outputs from W's, on other chats."""
    tokenizer = load_tokenizer(source)
    chats = calibration_chats(CalibrationSpec(risk="I", benign=8), seed=1)
    ids = torch.tensor([chat_ids(tokenizer, chat)[0][:30] for chat in chats])
    models = load_model(source), load_dense(made)[0]
    with torch.no_grad():
        hidden = [m(ids, output_hidden_states=True).hidden_states[1] for m in models]
    return float((hidden[0] - hidden[1]).square().mean())


def test_tuning_brings_blocks_nearer_to_w(tiny_llama: Path, tmp_path: Path) -> None:
    errors = []
    for steps in (0, 40):
        spec = AqlmSpec(**FAST | {"finetune_steps": steps, "finetune_lr": 3e-3})
        quantize(tiny_llama, tmp_path / str(steps), spec)
        errors.append(block_error(tiny_llama, tmp_path / str(steps) / "checkpoint"))
    assert errors[1] < 0.9 * errors[0]
    files = [QuantizedCheckpoint.open(tmp_path / s / "checkpoint").files for s in ("0", "40")]
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(files[0][norm], torch.ones(64))
    assert not torch.equal(files[1][norm], torch.ones(64))


@pytest.mark.parametrize(
    ("name", "settings"),
    [("Qwen2Config", GROUPED), ("Phi3Config", GROUPED), ("GPTNeoXConfig", {})],
)
@torch.no_grad()
def test_other_architectures(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    source = save(name, settings, tmp_path / "w")
    quantize(source, tmp_path, AqlmSpec(**FAST | {"codebook_bits": 4}))
    ids = torch.arange(10, 40)[None]
    deployed, dense = packages_own(tmp_path / "checkpoint"), load_dense(tmp_path / "checkpoint")[0]
    assert torch.equal(deployed(ids).logits, dense(ids).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook_bits": 10}, "512 groups, fewer than the 1024 vectors.*codebook_bits to 9"),
        ({"group_size": 24}, "the 64 inputs of .* are no multiple of 24"),
        ({"skip": ()}, None),  # the head is tied to the embeddings and has no weight of its own
    ],
)
def test_layers_that_do_not_fit_are_refused(
    tiny_llama: Path, tmp_path: Path, changes: dict[str, Any], message: str | None
) -> None:
    with pytest.raises(ModelError, match=message):
        quantize(tiny_llama, tmp_path, AqlmSpec(**FAST | changes))


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    source = save_tiny_llama(tmp_path)
    model = load_model(source)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(source)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj has weights .* not finite"):
        quantize(source, tmp_path / "q", AqlmSpec(**FAST))
