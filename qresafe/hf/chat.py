"""Chats to token ids, always by the tokenizer's own chat template."""

from __future__ import annotations

import datetime
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import jinja2

from qresafe.errors import DataError, ModelError

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": ...}

# What day it is for templates that ask (Llama 3.2, gpt-oss): prompts must not change overnight,
# between W's answers and Q0's. It is the day that Llama 3.1's template names by itself.
TODAY = datetime.date(2024, 7, 26)
_PROBE = "qresafe-probe"  # survives any template's stripping, and occurs in none


def prompt_ids(tokenizer: Any, prompt: str, system: str | None = None) -> list[int]:
    """Return the ids of a one-turn chat, up to where the assistant's answer begins.

    Args:
        tokenizer: From `qresafe.hf.models.load_tokenizer`.
        prompt: The user's message.
        system: A system message, or None for the template's own default.

    Raises:
        ModelError: The template fails.
    """
    return text_ids(tokenizer, prompt_text(tokenizer, prompt, system))


def prompt_text(tokenizer: Any, prompt: str, system: str | None = None) -> str:
    """Return what `prompt_ids` encodes."""
    messages = [{"role": "system", "content": system}] if system else []
    return render(tokenizer, [*messages, {"role": "user", "content": prompt}])


def answer_ids(tokenizer: Any, context: str, text: str) -> list[int]:
    """Return the ids of an assistant's answer, ending in the template's end-of-turn token.

    Args:
        tokenizer: The model's.
        context: The rendered chat before it.
        text: The answer.
    """
    return [*continued_ids(tokenizer, context, text), end_id(tokenizer)]


def continued_ids(tokenizer: Any, context: str, text: str) -> list[int]:
    """Return the ids of a text as a model would write it behind `context`.

    Encoded alone it may begin otherwise: SentencePiece puts a space before it. Where the two
    cannot be told apart, because a token spans both, it is encoded alone.
    """
    before, whole = text_ids(tokenizer, context), text_ids(tokenizer, context + text)
    if whole[: len(before)] == before:
        return whole[len(before) :]
    return text_ids(tokenizer, text)


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text as it stands: what a template renders holds its own first token."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def chat_ids(tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Return (context ids, ids of the last assistant message with its end token).

    Raises:
        DataError: The chat does not end in an assistant message that follows another message.
    """
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        remedy = "end every chat in an assistant message"
        raise DataError("a chat has no final assistant message", remedy=remedy)
    context = render(tokenizer, list(messages[:-1]))
    return text_ids(tokenizer, context), answer_ids(tokenizer, context, messages[-1]["content"])


def render_ids(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Return the ids of what `render` returns."""
    return text_ids(tokenizer, render(tokenizer, messages))


def render(tokenizer: Any, messages: list[Message]) -> str:
    """Return a chat's text with the opening of the assistant's next turn.

    Where the template has no system role (Gemma's, Mistral's first), a system message goes in
    front of the first user message, as in Gemma 3's own template.

    Raises:
        ModelError: The template refuses the chat.
    """
    if any(message["role"] == "system" for message in messages) and not has_system_role(tokenizer):
        messages = without_system_role(messages)
    return _render(tokenizer, messages, opening=True)


@functools.lru_cache(maxsize=16)
def has_system_role(tokenizer: Any) -> bool:
    """Say whether the template renders a system message; warn if it refuses it or drops it."""
    chat = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "x"}]
    try:
        found = _PROBE in _render(tokenizer, chat, opening=True)
    except ModelError as error:
        if not isinstance(error.__context__, jinja2.TemplateError):
            raise
        found = False
    if not found:
        warn_of_no_role()
    return found


@functools.cache
def warn_of_no_role() -> None:
    """Say it once; other models of a run have the same template."""
    where = "in front of the first user message"
    warnings.warn(f"no system role in the chat template: system prompts go {where}", stacklevel=2)


def without_system_role(messages: Sequence[Message]) -> list[Message]:
    """Return a chat whose system messages stand in front of its first user message."""
    said = [message["content"] for message in messages if message["role"] == "system"]
    rest = [message for message in messages if message["role"] != "system"]
    first = next((i for i, message in enumerate(rest) if message["role"] == "user"), None)
    if first is None:
        raise DataError("a chat has no user message", remedy="let a user speak in every chat")
    rest[first] = {"role": "user", "content": "\n\n".join([*said, rest[first]["content"]])}
    return rest


@functools.lru_cache(maxsize=16)
def end_id(tokenizer: Any) -> int:
    """Return the token that the template puts after an assistant's turn (else the end token).

    Gemma and others end a turn by another token than `eos_token`.
    """
    if not tokenizer.chat_template:
        return int(tokenizer.eos_token_id)
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _PROBE}]
    rest = _render(tokenizer, chat, opening=False).rpartition(_PROBE)[2]
    added = tokenizer.added_tokens_decoder.items()
    special = set(tokenizer.all_special_ids) | {token for token, entry in added if entry.special}
    ids: list[int] = tokenizer.encode(rest, add_special_tokens=False)
    return next((token for token in ids if token in special), int(tokenizer.eos_token_id))


def _render(tokenizer: Any, messages: list[Message], *, opening: bool) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=opening,
                strftime_now=TODAY.strftime,
            )
        )
    except Exception as error:  # a template is a program: it may fail in any way
        what = f"the chat template fails ({' '.join(str(error).split())[:200]})"
        raise ModelError(what, where=str(tokenizer.name_or_path)) from None
