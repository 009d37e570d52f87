"""Several continuations of the same prompts, which are read once, equal separate generations."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qresafe.hf.generate import Branch, generate_batch, generate_branches
from qresafe.hf.models import load_model, load_tokenizer
from qresafe.specs import AttackSpec, GenerateSpec
from qresafe.stages.attack_grid import configurations

PROMPTS = [[1, 9, 30, 31], [1, 40], [1, 50, 51, 52, 53, 54, 55]]


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    return load_model(str(tiny_llama))


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(str(tiny_llama))


def branches(decoding: str, tokens: int) -> list[Branch]:
    return [
        Branch(
            [f"{row}/{one.name}" for row in range(len(PROMPTS))],
            GenerateSpec(max_new_tokens=tokens, seed=3, **one.decoding.model_dump()),
        )
        for one in configurations(AttackSpec(decoding=decoding))  # type: ignore[arg-type]
    ]


def test_all_49_configurations_give_the_tokens_of_separate_calls(
    model: Any, tokenizer: Any
) -> None:
    wanted = branches("huang", 12)
    together = generate_branches(model, tokenizer, PROMPTS, wanted)
    apart = [generate_batch(model, tokenizer, PROMPTS, b.keys, b.spec) for b in wanted]
    assert together == apart
    texts = {tuple(generated.ids) for made in together for generated in made}
    assert len(texts) > 49  # they do differ


def test_the_prompts_are_read_once(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []
    forward = type(model).forward

    def counting(self: Any, input_ids: torch.Tensor, **given: Any) -> Any:
        widths.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **given)

    counting.__wrapped__ = forward  # type: ignore[attr-defined]  # for inspect.signature
    monkeypatch.setattr(type(model), "forward", counting)
    generate_branches(model, tokenizer, PROMPTS, branches("paper", 4))
    assert [width for width in widths if width > 1] == [7]  # the longest prompt, one time


def test_a_short_branch_does_not_disturb_a_long_one(model: Any, tokenizer: Any) -> None:
    keys = ["a", "b", "c"]
    short = Branch(keys, GenerateSpec(max_new_tokens=2, temperature=1.0))
    long = Branch(keys, GenerateSpec(max_new_tokens=9))
    one, two, three = generate_branches(model, tokenizer, PROMPTS, [short, long, short])
    assert one == three
    assert two == generate_batch(model, tokenizer, PROMPTS, keys, long.spec)


def test_sliding_windows_branch_too(tmp_path: Path, tokenizer: Any) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, sliding_window=4, initializer_range=0.3,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    sliding = MistralForCausalLM(config).eval()
    wanted = branches("paper", 8)
    apart = [generate_batch(sliding, tokenizer, PROMPTS, b.keys, b.spec) for b in wanted]
    assert generate_branches(sliding, tokenizer, PROMPTS, wanted) == apart
