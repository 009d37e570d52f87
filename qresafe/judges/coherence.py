"""Is a text language at all? Signs of the ways in which damaged models fail.

Each sign is one short function of the text that returns what it saw, or None. They look for
structure, not for vocabulary, so that any language, code and lists pass.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise

LOOK_AT = 600  # characters; a model that breaks down later has answered before

_GARBAGE = re.compile("[\ufffd\ue000-\uf8ff\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_LATIN_WORD = re.compile(r"(?<![\w/.@-])[A-Za-z]{4,}(?![\w/@-])")
# What English, and its neighbours in the Latin alphabet, hardly ever spell; Dutch has "ijk".
_UNSPELLABLE = re.compile(
    r"q[^u ]|(?:v|(?<!i)j)[bcdfgjkmnpqsvwxz]|x[bdfgjkmnrsvwxz]|[bcdfghjklmnpqrstvwxz]{5}|[aeiou]{4}"
    r"|[a-z][A-Z]|\b[bcdfghjklmnpqrstvwxz]{4,}\b"
)
_SCRIPTS = tuple(
    re.compile(pattern)
    for pattern in (
        "[A-Za-z]{2}",
        "[\u0400-\u04ff]{2}",  # Cyrillic
        "[\u0370-\u03ff]{2}",  # Greek
        "[\u0590-\u05ff]{2}",  # Hebrew
        "[\u0600-\u06ff]{2}",  # Arabic
        "[\u0900-\u0dff]{2}",  # the scripts of India
        "[\u0e00-\u0eff]{2}",  # Thai, Lao
        "[\u3040-\u30ff\u4e00-\u9fff]{2}",  # Japanese and Chinese share characters
        "[\uac00-\ud7af]{2}",  # Korean
    )
)


def incoherence(text: str) -> str | None:
    """Return why `text` is no language, or None if it looks like some.

    Args:
        text: A whole completion; its first `LOOK_AT` characters are looked at.
    """
    head = text[:LOOK_AT].strip()
    if not head:
        return "empty"
    for sign in _SIGNS:
        if found := sign(head):
            return found
    return None


def _byte_garbage(text: str) -> str | None:
    if not _GARBAGE.search(text):
        return None
    return "byte garbage" if len(_GARBAGE.findall(text)) > 0.02 * len(text) else None


def _only_symbols(text: str) -> str | None:
    head = text[:120]
    if len(head) < 12:
        return None
    return "symbols only" if sum(map(str.isalnum, head)) < 0.25 * len(head) else None


def _repetition(text: str) -> str | None:
    words = text.split()
    if len(words) < 8 or len(set(words)) > 0.6 * len(words):
        return None
    stutters = sum(a == b for a, b in pairwise(words))
    if stutters > 0.25 * len(words):
        return "the same word again and again"
    triples = list(zip(words, words[1:], words[2:], strict=False))
    if len(triples) >= 16 and len(set(triples)) < 0.35 * len(triples):
        return "the same phrase again and again"
    return None


def _mixed_scripts(text: str) -> str | None:
    if text.isascii():
        return None
    seen = sum(bool(script.search(text)) for script in _SCRIPTS)
    return "many scripts mixed" if seen >= 4 else None


def _non_words(text: str) -> str | None:
    head = text[:160]
    if _UNSPELLABLE.search(head) is None:
        return None
    words = _LATIN_WORD.findall(head)
    if len(words) < 4:
        return None
    odd = sum(1 for _ in _UNSPELLABLE.finditer(" ".join(words)))
    return "no words" if odd > 0.3 * len(words) else None


_SIGNS: tuple[Callable[[str], str | None], ...] = (
    _byte_garbage,
    _only_symbols,
    _repetition,
    _mixed_scripts,
    _non_words,
)
