"""Batched generation against `model.generate`, and scores against a plain forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)
from transformers.generation.logits_process import TopPLogitsWarper

from qresafe.errors import ModelError
from qresafe.hf.generate import generate_batch, sequence_logps, teacher_distribution
from qresafe.hf.models import load_model, load_tokenizer
from qresafe.hf.sampling import Sampler
from qresafe.specs import GenerateSpec

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
SLIDING: dict[str, Any] = {"sliding_window": 8}  # shorter than most prompts below
FAMILIES = {
    "llama": (LlamaConfig, GROUPED),
    "qwen2": (Qwen2Config, GROUPED),
    "mistral, sliding window": (MistralConfig, GROUPED | SLIDING),
    "gemma3, both kinds of layer": (
        Gemma3TextConfig,
        GROUPED | SLIDING | {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt-neox": (GPTNeoXConfig, {}),
}


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(tiny_llama)


def make(kind: type[PreTrainedConfig], size: int, extra: dict[str, Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return AutoModelForCausalLM.from_config(kind(vocab_size=size, **SIZES, **extra)).eval()


def random_ids(count: int, longest: int, vocabulary: int = 250) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(6, vocabulary, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(family: str, tokenizer: Any) -> None:
    kind, extra = FAMILIES[family]
    model = make(kind, len(tokenizer), extra)
    prompts = random_ids(7, 20)
    with torch.no_grad():  # make the end token likely enough that some rows stop early
        model.get_output_embeddings().weight[2] *= 4
    keys = [str(row) for row in range(len(prompts))]
    made = generate_batch(model, tokenizer, prompts, keys, GenerateSpec(max_new_tokens=24))
    for prompt, row in zip(prompts, made, strict=True):
        ids = torch.tensor([prompt])
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
        )
        assert row.ids == whole[0, len(prompt) :].tolist()
        assert row.finish == ("stop" if row.ids[-1] == 2 else "length")
        assert row.text == tokenizer.decode(row.ids, skip_special_tokens=True)


def test_rows_that_end_leave_the_batch(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(LlamaConfig, len(tokenizer), GROUPED)
    with torch.no_grad():
        model.get_output_embeddings().weight[2] *= 6
    seen: list[int] = []
    forward = type(model).forward

    def spy(self: Any, input_ids: torch.Tensor, **rest: Any) -> Any:
        seen.append(len(input_ids))
        return forward(self, input_ids=input_ids, **rest)

    spy.__signature__ = __import__("inspect").signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(model), "forward", spy)
    prompts = random_ids(16, 12)
    made = generate_batch(model, tokenizer, prompts, list("abcdefghijklmnop"), GenerateSpec())
    assert {row.finish for row in made} == {"stop", "length"}  # the case is not empty
    assert seen[0] == 16
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] <= 12  # 3/4 of 16, or fewer


def test_sampling_does_not_depend_on_the_batch(tokenizer: Any) -> None:
    model = make(LlamaConfig, len(tokenizer), GROUPED)
    spec = GenerateSpec(max_new_tokens=12, temperature=1.0, top_k=50, top_p=0.95, seed=3)
    prompts = random_ids(6, 15)
    keys = [f"p{row}/0" for row in range(6)]
    together = generate_batch(model, tokenizer, prompts, keys, spec)
    alone = [
        generate_batch(model, tokenizer, [prompt], [key], spec)[0]
        for prompt, key in zip(prompts, keys, strict=True)
    ]
    backwards = generate_batch(model, tokenizer, prompts[::-1], keys[::-1], spec)[::-1]
    assert together == alone == backwards
    again = generate_batch(model, tokenizer, prompts, [f"p{row}/1" for row in range(6)], spec)
    assert [row.ids for row in again] != [row.ids for row in together]


def test_the_gumbel_trick_draws_from_the_softmax() -> None:
    # 4000 draws of p = softmax(2 log(1..4)/2) = (.1, .2, .3, .4); 4 sigma of .4 is .031.
    logits = 2 * torch.tensor([1.0, 2.0, 3.0, 4.0]).log().repeat(4000, 1)
    spec = GenerateSpec(temperature=2.0)
    sampler = Sampler(spec, [str(row) for row in range(4000)], torch.device("cpu"))
    shares = sampler.pick(logits).bincount(minlength=4) / 4000
    assert shares.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.031)


def test_top_p_keeps_the_same_tokens_as_transformers() -> None:
    logits = torch.randn(500, 30, generator=torch.Generator().manual_seed(0)) * 2
    spec = GenerateSpec(temperature=1.0, top_p=0.5)
    sampler = Sampler(spec, [str(row) for row in range(500)], torch.device("cpu"))
    allowed = TopPLogitsWarper(0.5)(None, logits.clone()) > -torch.inf
    assert allowed.gather(1, sampler.pick(logits)[:, None]).all()
    assert not allowed.all()


def test_a_model_without_a_cache_is_refused(tokenizer: Any) -> None:
    config = MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match="no key-value cache"):
        generate_batch(model, tokenizer, [[7]], ["a"], GenerateSpec())


def test_scores_are_those_of_one_sequence_at_a_time(tiny_llama: Path) -> None:
    model = load_model(tiny_llama)
    prompts, answers = random_ids(5, 12), random_ids(5, 9)[::-1]
    sums, counts = sequence_logps(model, prompts, answers)
    ids, logps = teacher_distribution(model, prompts, answers, tokens=3, top_k=4)
    assert counts.tolist() == [len(answer) for answer in answers]
    assert sums.dtype == torch.float64
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double()
        full = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        expected = sum(full[at, token].item() for at, token in enumerate(answer))
        assert sums[row].item() == pytest.approx(expected, abs=1e-4)
        best = full[:3].topk(4)
        assert torch.equal(ids[row], best.indices)
        assert torch.allclose(logps[row].double(), best.values, atol=1e-5)
