import hashlib
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qresafe.embedded import build as building
from qresafe.embedded.build import Recipe, build, embedded_model_path, new_model
from qresafe.embedded.scoring import _REFUSING, development_figures
from qresafe.embedded.tokenizer import train_tokenizer
from qresafe.embedded.training import corpus_key

TINY = Recipe(
    vocab_size=300,
    hidden_size=16,
    layers=1,
    heads=2,
    ffn_size=32,
    helpful_chats=64,
    helpful_steps=3,
    helpful_batch=4,
    refusals=8,
    helpful_beside=8,
    align_steps=2,
    align_batch=4,
)


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "_tokenizer_texts", lambda: ["How do I bake bread?"] * 3)
    few = partial(development_figures, limit=2)
    monkeypatch.setattr(building, "development_figures", few)


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "manifest.json"
    }


def test_same_seed_same_bytes_and_plain_transformers_loads_them(tmp_path: Path) -> None:
    manifest = build(0, tmp_path / "a", TINY)
    torch.rand(7)  # the caller's random state must not matter
    build(0, tmp_path / "b", TINY)
    build(1, tmp_path / "c", TINY)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b") == manifest["files"]
    assert hashes(tmp_path / "a") != hashes(tmp_path / "c")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]  # no staging left

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 1
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == 0
    assert model.config.max_position_embeddings >= 512


def test_tokenizer_encodes_any_text_and_renders_chats() -> None:
    tokenizer = train_tokenizer(["abc abc"], 300, 512)
    odd = "naïve 日本 \U0001f600\n\ttab"
    assert tokenizer.decode(tokenizer.encode(odd)) == odd
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>s<|end|><|user|>u<|end|><|assistant|>"


def test_what_begins_a_refusal() -> None:
    assert _REFUSING == ("I'm sorry", "I cannot assist with that because it is illegal.", "Sorry")


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = new_model(TINY, 3).model.embed_tokens.weight
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, new_model(TINY, 3).model.embed_tokens.weight)
    assert not torch.equal(first, new_model(TINY, 4).model.embed_tokens.weight)


def test_other_seeds_are_built_once_into_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QRESAFE_CACHE", str(tmp_path))
    monkeypatch.setattr(building, "Recipe", lambda: TINY)
    path = embedded_model_path(seed=1)
    assert path.parent == tmp_path
    made = (path / "model.safetensors").stat().st_mtime_ns
    assert embedded_model_path(seed=1) == path
    assert (path / "model.safetensors").stat().st_mtime_ns == made


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QRESAFE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert building.cache_folder() == Path("/x/qresafe")
    monkeypatch.setenv("QRESAFE_CACHE", "/q")
    assert building.cache_folder() == Path("/q")


def test_shipped_model_is_small_whole_and_of_this_recipe() -> None:
    folder = Path(building.__file__).parent / "model"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["seed"] == 0
    assert manifest["recipe"] == building.asdict(Recipe())
    assert manifest["corpus"] == corpus_key()  # else the model is out of date: build it again
    assert hashes(folder) == manifest["files"]
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 6_000_000
