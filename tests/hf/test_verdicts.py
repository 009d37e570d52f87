"""Label and next-token probabilities: batches give each row what it gets alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import save_tiny_tokenizer

from qresafe.errors import ModelError
from qresafe.hf.models import load_model, load_tokenizer
from qresafe.hf.verdicts import encode, label_probabilities, next_token_probabilities

TEXTS = ["a", "a much longer text than the others", "and one between"]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with labels, and a config that names no padding token."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("decoder")
    config = LlamaConfig(
        vocab_size=save_tiny_tokenizer(folder),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.5,
        num_labels=3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_a_decoder_reads_the_last_token_before_the_padding(decoder: Path) -> None:
    model, tokenizer = load_model(decoder, classifier=True), load_tokenizer(decoder, chat=False)
    encoded = [encode(tokenizer, text) for text in TEXTS]
    together = label_probabilities(model, tokenizer, encoded)
    assert together.shape == (3, 3)
    assert torch.allclose(together.sum(dim=1), torch.ones(3), atol=1e-6)
    for row, text in zip(together, TEXTS, strict=True):
        with torch.no_grad():
            alone = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        assert torch.allclose(row, alone, atol=1e-5)


def test_without_a_padding_token_it_is_said(decoder: Path) -> None:
    model, tokenizer = load_model(decoder, classifier=True), load_tokenizer(decoder, chat=False)
    tokenizer.pad_token = None
    with pytest.raises(ModelError, match="no padding token"):
        label_probabilities(model, tokenizer, [encode(tokenizer, text) for text in TEXTS])


def test_next_tokens_do_not_depend_on_the_batch(tiny_llama: Path) -> None:
    model = load_model(tiny_llama)
    prompts = [[5, 9, 11, 40, 7], [8], [100, 3, 77]]
    wanted = [10, 20, 30]
    together = next_token_probabilities(model, prompts, wanted)
    for row, prompt in zip(together, prompts, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, -1, wanted]
        assert torch.allclose(row, logits.softmax(-1), atol=1e-5)
