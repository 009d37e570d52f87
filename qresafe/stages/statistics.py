"""What a difference between two models is worth: intervals, exact tests, and what n can resolve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from scipy import stats


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


class Flips(NamedTuple):
    """How a yes-or-no outcome changed between two models, prompt by prompt."""

    n: int  # prompts that have a decided outcome under both
    gained: int  # no before, yes after
    lost: int  # yes before, no after


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Return Wilson's score interval of a binomial share (Wilson 1927).

    Args:
        successes: Count of successes, 0 <= successes <= n.
        n: Count of trials; 0 gives the whole of [0, 1], because nothing is known.
        confidence: The interval's coverage.
    """
    if n == 0:
        return Interval(0.0, 1.0)
    found = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return Interval(float(found.low), float(found.high))


def paired_flips(before: Any, after: Any) -> Flips:
    """Count the changes of an outcome between two models on the same prompts.

    Args:
        before: Per prompt under the first model (integer array): 1 yes, 0 no, below 0 undecided.
        after: The same prompts, in the same order, under the second model.

    Returns:
        The counts over the prompts that are decided under both.
    """
    both = (before >= 0) & (after >= 0)
    gained, lost = both & (after > before), both & (after < before)
    return Flips(int(both.sum()), int(gained.sum()), int(lost.sum()))


def mcnemar(gained: int, lost: int) -> float:
    """Return the two-sided exact p value of McNemar's test.

    Under the null hypothesis each flip goes either way with probability 1/2, so the smaller count
    is binomial (McNemar 1947, exact form). No flips at all: p = 1.
    """
    if gained + lost == 0:
        return 1.0
    return float(stats.binomtest(gained, gained + lost, 0.5).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's step-down adjusted p values, in the order given (Holm 1979).

    The k-th smallest of m is multiplied by m - k + 1; a later one is never below an earlier one,
    and none exceeds 1.
    """
    m = len(p_values)
    adjusted = [1.0] * m
    highest = 0.0
    for rank, index in enumerate(sorted(range(m), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (m - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def minimum_detectable_effect(n: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """Return the smallest change of a share that n paired prompts would have shown.

    The change is of one direction only (a damage or a repair), a fraction d of the n prompts. The
    count of flips is then binomial(n, d), and McNemar's exact test is significant from k flips on,
    where 2 * 2**-k <= alpha. The result is the d at which at least k flips occur with `power`.

    Args:
        n: Prompts decided under both models.
        alpha: Two-sided level of the test, uncorrected.
        power: Probability of a significant result.

    Returns:
        d in (0, 1]; 1 where n prompts cannot reach significance whatever happens.
    """
    flips_needed = math.ceil(1 - math.log2(alpha))
    if n < flips_needed:
        return 1.0
    # P(binomial(n, d) >= k) = I_d(k, n - k + 1): the inverse in d is a beta quantile.
    return float(stats.beta.ppf(power, flips_needed, n - flips_needed + 1))


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return Student's t interval of a mean; from one value alone it is that value.

    Args:
        values: At least one value.
        confidence: The interval's coverage.
    """
    mean = math.fsum(values) / len(values)
    error = float(stats.sem(values)) if len(values) > 1 else 0.0
    half = float(stats.t.ppf((1 + confidence) / 2, max(1, len(values) - 1))) * error
    return Interval(mean - half, mean + half)
