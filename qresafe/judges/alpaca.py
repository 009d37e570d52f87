"""AlpacaEval (Li et al. 2023, Dubois et al. 2024): what is asked, and the win rate.

A preference is a number from 1 (the reference's output is better) to 2 (the model's is), 1.5 a
draw; 0 is the old way of writing a draw. The definitions are those of `alpaca_eval`'s
metrics/winrate.py and metrics/helpers.py; the prompt is that of its annotator
`weighted_alpaca_eval_gpt4_turbo`, which reads the probabilities of the answers "m" and "M".
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qresafe.judges.templates import template

LIKELIEST = 5  # first tokens whose probabilities are asked for, as published
DRAW = 1.5

Preference = float | None


def messages(instruction: str, first: str, second: str) -> list[dict[str, str]]:
    """Return what the annotator is asked; `first` is shown as "m", `second` as "M"."""
    prompt = template("alpaca_eval")
    texts = {"instruction": instruction, "output_1": first, "output_2": second}
    return [
        {"role": "system", "content": prompt.system},
        {"role": "user", "content": prompt.render(**texts)},
    ]


def is_swapped(instruction: str, seed: int = 0) -> bool:
    """Return whether the model's output is shown first: a coin that falls the same every time."""
    return bool(hashlib.sha256(f"{seed}/{instruction}".encode()).digest()[0] & 1)


def preference(answer: str, *, swapped: bool) -> Preference:
    """Read an annotator's answer (`stages.asking.AskJob` with `likeliest`).

    Args:
        answer: The text, or JSON {"text": ..., "top": {token: log-probability} or null}. Where
            there are no probabilities, the text decides.
        swapped: Whether the model's output was "m".

    Returns:
        2 - P(m), or what the text says; None if neither m nor M occurs.
    """
    said: dict[str, Any] = json.loads(answer) if answer.startswith("{") else {"text": answer}
    top: Mapping[str, float] = said.get("top") or {str(said["text"]).strip(): 0.0}
    shares = {token: math.exp(top[token]) for token in ("m", "M") if token in top}
    if not any(shares.values()):
        return None
    shown_second = 1 + shares.get("M", 0.0) / sum(shares.values())
    return 3 - shown_second if swapped else shown_second


def win_rate(preferences: Sequence[Preference]) -> dict[str, float | int | None]:
    """Return how often the model wins, as `alpaca_eval` counts.

    Args:
        preferences: One per instruction; None, NaN and what is outside 1 to 2 is left out.

    Returns:
        win_rate and discrete_win_rate (each preference rounded first) in percent,
        standard_error of win_rate in percentage points, n_wins, n_wins_base, n_draws, n_total.
    """
    given = as_array(preferences)
    wins = valid(given) - 1
    whole = valid(np.where(given == DRAW, DRAW, np.round(given))) - 1
    n = len(wins)
    return {
        "win_rate": float(wins.mean() * 100) if n else None,
        "discrete_win_rate": float(whole.mean() * 100) if n else None,
        "standard_error": float(wins.std(ddof=1) / math.sqrt(n) * 100) if n > 1 else None,
        "n_wins": int((wins > 0.5).sum()),
        "n_wins_base": int((wins < 0.5).sum()),
        "n_draws": int((given == DRAW).sum()),
        "n_total": n,
    }


def as_array(preferences: Sequence[Preference]) -> NDArray[np.float64]:
    """Return preferences as numbers: NaN where there is none, a draw where 0 stands for it."""
    numbers = np.array([math.nan if p is None else float(p) for p in preferences], dtype=float)
    return np.where(numbers == 0, DRAW, numbers)


def valid(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the numbers that are preferences, in order."""
    return numbers[(numbers >= 1) & (numbers <= 2)]
