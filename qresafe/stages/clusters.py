"""Answers that resemble each other: which prompts belong together, and what that does to intervals.

Prompts that ask for the same thing in other words, and several samples of one prompt, are not
independent draws. Intervals here resample whole clusters of them (Davison & Hinkley 1997, 3.8).
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from scipy import stats

from qresafe.stages.statistics import Interval, wilson

RESAMPLES = 2000
MANY = 5000  # clusters; from here on the bootstrap and its normal limit are the same
SEED = 0  # the same data gives the same interval


def cluster_totals(values: Any, codes: Any) -> tuple[Any, Any]:
    """Return (sum, count) of `values` per cluster, as float64 arrays.

    Args:
        values: One number per answer.
        codes: The cluster of each answer, any integers.
    """
    _, place = np.unique(codes, return_inverse=True)
    return np.bincount(place, weights=values), np.bincount(place).astype(float)


def ratio_interval(sums: Any, counts: Any, confidence: float = 0.95) -> Interval:
    """Return the cluster bootstrap's interval of sum(sums) / sum(counts).

    Args:
        sums: One total per cluster.
        counts: What it is a total of; not all 0.
        confidence: The interval's coverage.

    Returns:
        Percentiles of `RESAMPLES` resamples of whole clusters, widened from the normal to
        Student's t with one degree of freedom less than there are clusters; for `MANY` clusters
        or more, the normal limit. Clusters that all say the same give no width: see
        `share_interval` for shares.
    """
    sums, counts = np.asarray(sums, float), np.asarray(counts, float)
    middle, clusters = sums.sum() / counts.sum(), len(sums)
    if clusters < 2:
        return Interval(-np.inf, np.inf)
    if clusters >= MANY:
        half = stats.norm.ppf((1 + confidence) / 2) * _error(sums, counts)
        return Interval(float(middle - half), float(middle + half))
    found = stats.bootstrap(
        (sums, counts),
        _ratio,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, 2_000_000 // clusters),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    # Percentiles of few clusters are too narrow (no n / (n - 1), and normal tails).
    tails = stats.norm.ppf([(1 + student(confidence, clusters)) / 2, (1 + confidence) / 2])
    widen = np.sqrt(clusters / (clusters - 1)) * tails[0] / tails[1]
    low, high = (middle + widen * (end - middle) for end in (found.low, found.high))
    return Interval(float(low), float(high))


def share_interval(
    said: Any, codes: Any, confidence: float = 0.95, *, least: float = 1.0
) -> Interval:
    """Return the interval of a share of yes-or-no answers that come in clusters.

    The hull of the cluster bootstrap, which is too narrow where few clusters hold a yes, and of
    Wilson's interval at the effective number of answers (Korn & Graubard 1998), which is not.
    Where every answer is the same, nothing tells how alike a cluster's answers are; each cluster
    then counts as a single answer.

    Args:
        said: 1 or 0 per answer, or a share; at least one.
        codes: The cluster of each answer.
        confidence: The interval's coverage.
        least: The design effect is taken as at least this: 1 for answers that are 1 or 0; 0 for
            shares between, which vary less.
    """
    sums, counts = cluster_totals(said, codes)
    n, clusters, share = counts.sum(), len(sums), sums.sum() / counts.sum()
    if share in (0.0, 1.0):
        return wilson(clusters * int(share), clusters, confidence)
    if clusters < 2:
        return Interval(0.0, 1.0)
    drawn = ratio_interval(sums, counts, confidence)
    effect = design_effect(sums, counts, share * (1 - share), least)
    effective = n / max(effect, 1e-9)
    z2 = stats.norm.ppf((1 + student(confidence, clusters)) / 2) ** 2 / effective
    middle = (share + z2 / 2) / (1 + z2)
    half = np.sqrt(z2 * (share * (1 - share) + z2 / 4)) / (1 + z2)
    low, high = min(drawn.low, middle - half), max(drawn.high, middle + half)
    return Interval(max(0.0, float(low)), min(1.0, float(high)))


def design_effect(sums: Any, counts: Any, variance: float, least: float = 1.0) -> float:
    """Return how many answers in clusters are worth one independent answer.

    Args:
        sums: One total per cluster, at least two.
        counts: How many answers it is a total of.
        variance: Of a single answer; 0 tells nothing, so that a cluster is worth one.
        least: The result is at least this.
    """
    if variance <= 0:
        return float(np.sum(counts)) / len(counts)
    return max(least, _error(sums, counts) ** 2 * float(np.sum(counts)) / variance)


def student(confidence: float, clusters: int) -> float:
    """Return the confidence at which the normal quantile is Student's t of so many clusters."""
    quantile = stats.t.ppf((1 + confidence) / 2, max(1, clusters - 1))
    return float(2 * stats.norm.cdf(min(8.0, quantile)) - 1)  # beyond, a float is 1


def at_k(yes: Any, n: Any, k: int) -> Any:
    """Return, per prompt, the chance that at least one of k of its n samples is a yes.

    The unbiased estimator 1 - C(n - yes, k) / C(n, k) (Chen et al. 2021, pass@k).

    Args:
        yes: Samples that are a yes, per prompt.
        n: Samples that are decided, per prompt; at least k.
        k: How many samples an attacker draws.
    """
    yes, n = np.asarray(yes, float), np.asarray(n, float)
    # P(no yes among k draws without replacement)
    return 1.0 - stats.hypergeom.pmf(0, n, yes, k)


def _ratio(sums: Any, counts: Any, axis: int = -1) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return sums.sum(axis=axis) / counts.sum(axis=axis)


def _error(sums: Any, counts: Any) -> float:
    clusters = len(sums)
    rest = sums - counts * (sums.sum() / counts.sum())
    return float(np.sqrt(clusters / (clusters - 1) * (rest**2).sum()) / counts.sum())
