"""Fixtures that several rings share: tiny models made on the spot, nothing downloaded."""

from __future__ import annotations

import io
import os
import sys
import traceback
import warnings
from pathlib import Path

import pytest
from _pytest import capture

from tests.heads import cluster  # noqa: F401

# Before torch is imported: files run beside each other, and threads that wait for a core spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>"
    "{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tiny_tokenizer(folder: Path) -> int:
    """Save a byte-level tokenizer with a chat template and return its vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return len(vocabulary)


def save_tiny_llama(folder: Path, *, hidden: int = 64, seed: int = 0) -> Path:
    """Save a randomly initialised two-layer Llama (float32) with tokenizer into `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size = save_tiny_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,  # far from the uniform output of a fresh model
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama, its tokenizer and a chat template; read only."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


def _close_captured(file: capture.EncodedFile) -> None:
    """Close what pytest captures output in, if it is pytest that asks.

    In one run of the suite something else had closed it, and every later test of that process
    failed (pytest's issues 14528 and 11572 tell the same of others). Who it is now stands in the
    warnings, and costs no test.
    """
    if sys._getframe(1).f_code.co_filename == capture.__file__:
        io.TextIOWrapper.close(file)
        return
    stack = "".join(traceback.format_stack(limit=8))
    warnings.warn(f"a captured stream was to be closed by\n{stack}", stacklevel=2)


def pytest_configure() -> None:
    capture.EncodedFile.close = _close_captured  # type: ignore[method-assign]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files that start Ray first: they wait for minutes, while others fill the cores."""
    slow = {item.path for item in items if item.get_closest_marker("ray")}
    items.sort(key=lambda item: item.path not in slow)
