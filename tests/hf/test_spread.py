"""A model over several devices answers as it does on one; on CPUs, one of them is the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qresafe.errors import ResourceError
from qresafe.hf import models
from qresafe.hf.answer_head import AnswerHead
from qresafe.hf.generate import generate_batch, sequence_logps, teacher_distribution
from qresafe.hf.models import load_model, load_tokenizer
from qresafe.hf.spread import blocks_on, gpus, place
from qresafe.specs import GenerateSpec

PROMPTS = [[1, 7, 9, 30], [1, 40, 41], [1, 12, 13, 14, 15]]
ANSWERS = [[20, 21, 22], [23], [24, 25]]
HALVES = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "disk",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


def said(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Return what every way of asking a model gives, each with its own inputs."""
    spec = GenerateSpec(max_new_tokens=12, temperature=1.0, seed=3)
    made = generate_batch(model, tokenizer, PROMPTS, ["a", "b", "c"], spec)
    sums, _ = sequence_logps(model, PROMPTS, ANSWERS)
    tokens, logps = teacher_distribution(model, PROMPTS, ANSWERS, 2, 5)
    with torch.no_grad():
        ids = torch.tensor([[1, 7, 9, 30], [1, 40, 41, 0]], device=model.device)
        positions = torch.tensor([1, 3, 6], device=model.device)
        chosen = AnswerHead(model).logits(model, ids, positions)
    return {
        "ids": [one.ids for one in made],
        "sums": sums.tolist(),
        "tokens": [one.tolist() for one in tokens],
        "logps": [one.tolist() for one in logps],
        "chosen": chosen.tolist(),
    }


def llama(blocks: int, **more: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads, num_hidden_layers=blocks, **more))


def test_the_word_for_so_many_gpus() -> None:
    assert [gpus(n) for n in (0, 1, 2)] == ["cpu", "cuda", "cuda:0,cuda:1"]


def test_blocks_stay_whole_and_halves_are_alike() -> None:
    model = llama(8)
    placed = blocks_on(model, {0: 10**9, 1: 10**9})
    assert set(placed.values()) == {0, 1}
    devices = [placed[f"model.layers.{n}"] for n in range(8)]  # a part of a block has other names
    assert devices == sorted(devices)
    # A block: q and o 32 x 32, k and v 16 x 32, three of 64 x 32, two norms = 9,280 weights. Of
    # 78,368 in all, a device may hold half and 1.25 blocks; embeddings are 2,048.
    assert sum(p.numel() for p in model.model.layers[0].parameters()) == 9_280
    held = [9_280 * devices.count(n) for n in (0, 1)]
    assert max(held) <= 78_368 / 2 + 1.25 * 9_280
    assert min(held) >= 78_368 / 2 - 2 * 9_280


def test_weights_that_do_not_fit_are_refused_instead_of_left_on_the_disk() -> None:
    need = 4 * sum(p.numel() for p in llama(8).parameters())
    assert blocks_on(llama(8), {0: need, 1: need})
    with pytest.raises(ResourceError, match=r"do not fit.*gpus_per_worker"):
        blocks_on(llama(8), {0: need // 3, 1: need // 3})


def test_a_dispatched_model_says_the_same(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hooks between devices are those of GPUs; here each device's tensors are on the CPU."""
    whole = said(load_model(tiny_llama), load_tokenizer(tiny_llama))
    halves = {"device_map": HALVES, "offload_folder": str(tmp_path)}
    monkeypatch.setattr(models, "placing", lambda device: halves)
    model = load_model(tiny_llama)
    assert next(model.model.layers[1].parameters()).device.type == "meta"  # it is on the disk
    assert said(model, load_tokenizer(tiny_llama)) == whole


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_say_what_one_says(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    one, two = (load_model(tiny_llama, device=gpus(count)) for count in (1, 2))
    assert len({parameter.device for parameter in two.parameters()}) == 2
    placed = place(load_model(tiny_llama), gpus(2))
    assert said(two, tokenizer) == said(one, tokenizer) == said(placed, tokenizer)
