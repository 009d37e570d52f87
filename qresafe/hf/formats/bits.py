"""Codes of 2 to 8 bits in 32-bit words, lowest bits first, as GPTQ checkpoints hold them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

WORD = 32


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack along the first dimension; a code may straddle two words (3 bits: every 11th does).

    Args:
        codes: Integers in [0, 2^bits), (n, columns).
        bits: 2 to 8.

    Returns:
        int32, (ceil(n * bits / 32), columns).
    """
    count, columns = codes.shape
    period = WORD // math.gcd(bits, WORD)
    whole = torch.nn.functional.pad(codes.to(torch.int32), (0, 0, 0, -count % period))
    whole = whole.view(-1, period, columns)
    words = torch.zeros(len(whole), period * bits // WORD, columns, dtype=torch.int32)
    for place, word, offset, spilt in _places(bits):
        words[:, word] |= whole[:, place] << offset
        if spilt > 0:
            words[:, word + 1] |= whole[:, place] >> (bits - spilt)
    return words.view(-1, columns)[: -(-count * bits // WORD)].contiguous()


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the first `count` codes, uint8 (count, columns), of what `pack_words` returns."""
    columns = words.shape[1]
    period = WORD // math.gcd(bits, WORD)
    per_period = period * bits // WORD
    whole = torch.nn.functional.pad(words, (0, 0, 0, -len(words) % per_period))
    whole = whole.view(-1, per_period, columns)
    codes = torch.empty(len(whole), period, columns, dtype=torch.uint8)
    for place, word, offset, spilt in _places(bits):
        value = whole[:, word] >> offset
        if spilt > 0:
            kept = bits - spilt
            value = value & ((1 << kept) - 1) | whole[:, word + 1] << kept
        codes[:, place] = value & ((1 << bits) - 1)
    return codes.view(-1, columns)[:count]


def _places(bits: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (code, word, offset in it, bits that spill into the next word) of one period."""
    for place in range(WORD // math.gcd(bits, WORD)):
        word, offset = divmod(place * bits, WORD)
        yield place, word, offset, offset + bits - WORD
