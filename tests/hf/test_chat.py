"""Chats to ids by the template; the expected ids are spelled out byte by byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qresafe.errors import DataError, ModelError
from qresafe.hf import chat
from qresafe.hf.models import load_tokenizer


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(tiny_llama)


def test_prompt_and_answer_ids(tokenizer: Any) -> None:
    letter = {c: tokenizer.convert_tokens_to_ids(c) for c in "hioky"}
    # <s>=1 </s>=2 <|user|>=4 <|assistant|>=5, as conftest numbers them
    assert chat.prompt_ids(tokenizer, "hi") == [1, 4, letter["h"], letter["i"], 2, 5]
    assert chat.answer_ids(tokenizer, "", "ok") == [letter["o"], letter["k"], 2]
    with_system = chat.prompt_ids(tokenizer, "hi", system="y")
    assert with_system == [1, 3, letter["y"], 2, 4, letter["h"], letter["i"], 2, 5]


def test_context_and_answer_make_the_whole_chat(tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "no"},
    ]
    context, answer = chat.chat_ids(tokenizer, messages)
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    assert context + answer == whole


def test_the_end_of_turn_is_the_templates_own(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ eos_token }}", "<|system|>\n")
    assert chat.end_id(tokenizer) == 3


def test_a_chat_without_an_answer_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no final assistant message"):
        chat.chat_ids(tokenizer, [{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("how", ["raises", "drops"])
def test_a_system_prompt_goes_to_the_user_where_the_template_has_no_role_for_it(
    tokenizer: Any, how: str
) -> None:
    refuse = "{{ raise_exception('System role not supported') }}" if how == "raises" else ""
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        + refuse
        + "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    )
    chat.warn_of_no_role.cache_clear()
    with pytest.warns(UserWarning, match="no system role"):
        asked = chat.prompt_ids(tokenizer, "hi", system="be kind")
    assert asked == chat.prompt_ids(tokenizer, "be kind\n\nhi")
    dialogue = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]
    context, answer = chat.chat_ids(tokenizer, dialogue)
    assert (context, answer) == (
        chat.prompt_ids(tokenizer, "s\n\nu"),
        chat.answer_ids(tokenizer, "s\n\nu", "a"),
    )
    with pytest.raises(DataError, match="no user message"):
        chat.render_ids(tokenizer, dialogue[:1])


def test_a_template_that_breaks_is_named(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ 1 / 0 }}"
    with pytest.raises(ModelError, match="division by zero"):
        chat.prompt_ids(tokenizer, "hi", system="be kind")


def test_an_answer_is_encoded_as_it_follows_the_prompt() -> None:
    """SentencePiece puts a space before a text of its own, which no model writes after a line."""
    letters = {letter: i for i, letter in enumerate(["<e>", "▁", "\n", "a", "o", "k"])}
    core = Tokenizer(models.BPE(vocab=letters, merges=[]))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>")
    assert tokenizer.encode("ok") == [1, 4, 5]
    assert chat.continued_ids(tokenizer, "a\n", "ok") == [4, 5]
    assert chat.answer_ids(tokenizer, "a\n", "ok") == [4, 5, 0]


def test_a_token_that_spans_prompt_and_answer_is_taken_apart() -> None:
    letters = {letter: i for i, letter in enumerate(["<e>", "a", "b", "ab"])}
    core = Tokenizer(models.BPE(vocab=letters, merges=[("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>")
    assert tokenizer.encode("ab") == [3]
    assert chat.continued_ids(tokenizer, "a", "b") == [2]


def test_prompts_are_the_same_every_day(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}"
    assert chat.prompt_text(tokenizer, "hi") == "26 Jul 2024"
