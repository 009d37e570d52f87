"""The change of a share between two models on the same prompts, with an interval that holds up.

Tango's score interval (Statistics in Medicine 17:891, 1998) inverts the score test of which
McNemar's chi-square is the case of no change. It keeps its coverage where few prompts flip, and
still says something where none does: with n prompts, less than z^2 / (n + z^2).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats

from qresafe.stages.clusters import cluster_totals, design_effect, ratio_interval, student
from qresafe.stages.statistics import Interval

FEW = 10  # clusters that changed; with fewer, nothing is known of how alike a cluster's changes are


class Change(NamedTuple):
    """A change of a share.

    Attributes:
        difference: Share after minus share before, over prompts decided under both.
        low: Lower end of its 95 % interval.
        high: Upper end.
        n: Prompts decided under both.
        clusters: Clusters that they come in; n where each stands alone.
        effective: Independent prompts with an interval as wide as this one's.
        method: "score", "cluster bootstrap" or "score, clusters as one".
    """

    difference: float
    low: float
    high: float
    n: int
    clusters: int
    effective: float
    method: str


def score_interval(gained: float, lost: float, n: float, confidence: float = 0.95) -> Interval:
    """Return Tango's interval of (gained - lost) / n.

    Args:
        gained: Pairs that became a yes; fractions are allowed.
        lost: Pairs that were one.
        n: All pairs, > 0.
        confidence: The interval's coverage.
    """
    z = float(stats.norm.ppf((1 + confidence) / 2))
    middle = (gained - lost) / n

    def excess(change: float) -> float:
        # z^2 * variance - distance^2: positive inside the interval
        return z * z * n * _variance(gained, lost, n, change) - (gained - lost - n * change) ** 2

    # In the middle itself the variance may vanish (no flips, or nothing but flips).
    inner = (middle - 1e-9, middle + 1e-9)
    low = optimize.brentq(excess, -1.0, inner[0]) if middle > -1 else -1.0
    high = optimize.brentq(excess, inner[1], 1.0) if middle < 1 else 1.0
    return Interval(float(low), float(high))


def change_of(before: Any, after: Any, codes: Any = None, confidence: float = 0.95) -> Change:
    """Return the change between two models, prompts in the same order.

    Args:
        before: 1, 0 per prompt under the first model; all decided.
        after: The same under the second.
        codes: The cluster of each prompt; None: each stands alone.
        confidence: The interval's coverage.

    Returns:
        Where prompts come in clusters, the hull of the score interval, which takes them as
        independent, of the cluster bootstrap, and of the score interval at the effective number of
        prompts; where fewer than `FEW` clusters changed, the score interval with every cluster
        counted as one prompt instead of the latter two.
    """
    moved = np.asarray(after, float) - np.asarray(before, float)
    n, gained, lost = len(moved), float((moved > 0).sum()), float((moved < 0).sum())
    plain = score_interval(gained, lost, n, confidence)
    difference = (gained - lost) / n
    if codes is None or len(np.unique(codes)) == n:
        return Change(difference, *plain, n, n, float(n), "score")
    sums, counts = cluster_totals(moved, codes)
    clusters = len(sums)
    if np.count_nonzero(cluster_totals(moved != 0, codes)[0]) < FEW:
        part = clusters / n
        wide = score_interval(part * gained, part * lost, clusters, confidence)
        method = "score, clusters as one"
    else:
        drawn = ratio_interval(sums, counts, confidence)
        variance = (gained + lost) / n - difference**2
        part = 1 / design_effect(sums, counts, variance)
        level = student(confidence, clusters)
        score = score_interval(part * gained, part * lost, part * n, level)
        wide = Interval(min(drawn.low, score.low), max(drawn.high, score.high))
        method = "cluster bootstrap"
    low, high = min(plain.low, wide.low), max(plain.high, wide.high)
    narrow = (plain.high - plain.low) / (high - low)
    effective = n * narrow**2 if method == "cluster bootstrap" else float(clusters)
    return Change(difference, low, high, n, clusters, effective, method)


def required_pairs(
    threshold: float,
    difference: float = 0.0,
    discordant: float = 0.0,
    confidence: float = 0.95,
    power: float = 0.8,
) -> int | None:
    """Return how many independent prompts tell a change from a threshold.

    Args:
        threshold: The change that is still accepted, in [0, 1).
        difference: The true change; below the threshold the answer is "accepted", above it "not".
        discordant: Share of prompts that flip either way, at least |difference|.
        confidence: Of the two-sided score interval that decides.
        power: Chance that n prompts decide.

    Returns:
        n; None where the true change is the threshold, which no n can tell. With no flips at all,
        n = z^2 (1 - threshold) / threshold, for certain.
    """
    if math.isclose(difference, threshold, abs_tol=1e-9):
        return None
    discordant = max(discordant, abs(difference))
    gained, lost = (discordant + difference) / 2, (discordant - difference) / 2
    at_threshold = _variance(gained, lost, 1.0, threshold)
    truly = max(0.0, discordant - difference**2)
    z, z_power = stats.norm.ppf((1 + confidence) / 2), stats.norm.ppf(power)
    root = (z * math.sqrt(at_threshold) + z_power * math.sqrt(truly)) / (threshold - difference)
    return math.ceil(float(root) ** 2 - 1e-9)


def _variance(gained: float, lost: float, n: float, change: float) -> float:
    """Return n times the variance of the change, `lost` fitted under p_gained = p_lost + change."""
    half = (-gained - lost + (2 * n - gained + lost) * change) / (4 * n)
    inside = max(0.0, half * half + lost * change * (1 - change) / (2 * n))
    fitted = math.sqrt(inside) - half
    return max(0.0, 2 * fitted + change * (1 - change))
