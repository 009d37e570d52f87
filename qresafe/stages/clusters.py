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
    tail = (1 + confidence) / 2
    widen = np.sqrt(clusters / (clusters - 1)) * stats.t.ppf(tail, clusters - 1)
    widen /= stats.norm.ppf(tail)
    low, high = (middle + widen * (end - middle) for end in (found.low, found.high))
    return Interval(float(low), float(high))


def share_interval(said: Any, codes: Any, confidence: float = 0.95) -> Interval:
    """Return the interval of a share of yes-or-no answers that come in clusters.

    Where every answer is the same, nothing tells how alike a cluster's answers are; each cluster
    then counts as a single answer, in Wilson's interval.

    Args:
        said: 1 or 0 per answer; at least one.
        codes: The cluster of each answer.
        confidence: The interval's coverage.
    """
    sums, counts = cluster_totals(said, codes)
    if sums.sum() in (0.0, counts.sum()):
        return wilson(len(sums) if sums.sum() else 0, len(sums), confidence)
    low, high = ratio_interval(sums, counts, confidence)
    return Interval(max(0.0, low), min(1.0, high))


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
