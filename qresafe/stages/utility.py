"""How useful a model still is: its answers beside reference answers, and its perplexity on them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from functools import cache
from typing import Any


def exact_match(completion: str, target: str) -> bool:
    """Return whether the two are the same text, but for spaces at the ends and between words."""
    return completion.split() == target.split()


def rouge_l(completion: str, target: str) -> float:
    """Return the F1 value in [0, 1] of the longest common subsequence of words (Lin 2004)."""
    return float(_scorer().score(target, completion)["rougeL"].fmeasure)


def perplexity(logps: Iterable[float], tokens: Iterable[int]) -> float | None:
    """Return exp(-sum log p / tokens) over all targets together; None where there are no tokens.

    Args:
        logps: Sum of log p(target tokens | prompt) per target, in nats.
        tokens: Tokens per target.
    """
    total, count = math.fsum(logps), sum(tokens)
    if count == 0:
        return None
    try:
        return math.exp(-total / count)
    except OverflowError:
        return math.inf


@cache
def _scorer() -> Any:
    # 1.5 s to import, and it tells on the root logger which tokenizer it uses.
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger("absl").setLevel(logging.WARNING)
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])
