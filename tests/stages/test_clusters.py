"""Cluster intervals against brute force, closed forms and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qresafe.stages.clusters import (
    MANY,
    at_k,
    cluster_totals,
    design_effect,
    ratio_interval,
    share_interval,
)
from qresafe.stages.statistics import mean_interval, wilson


def test_totals_by_cluster() -> None:
    sums, counts = cluster_totals(np.array([1.0, 2.0, 4.0]), np.array([7, -1, 7]))
    assert (sums.tolist(), counts.tolist()) == ([2.0, 5.0], [1.0, 2.0])


def test_the_bootstrap_is_all_resamples_of_clusters() -> None:
    # Four clusters have 4^4 = 256 equally likely resamples: their exact percentiles.
    sums, counts = np.array([3.0, 1.0, 0.0, 2.0]), np.array([4.0, 2.0, 3.0, 2.0])
    ratios = sorted(
        sums[list(drawn)].sum() / counts[list(drawn)].sum()
        for drawn in itertools.product(range(4), repeat=4)
    )
    middle = sums.sum() / counts.sum()
    # The widening undone: sqrt(4 / 3) and Student's t with 3 degrees of freedom, 3.1824 / 1.95996.
    widened = math.sqrt(4 / 3) * 3.182446 / 1.959964
    low, high = (middle + (end - middle) / widened for end in ratio_interval(sums, counts))
    assert low == pytest.approx(np.quantile(ratios, 0.025), abs=0.03)
    assert high == pytest.approx(np.quantile(ratios, 0.975), abs=0.03)


def test_clusters_of_one_are_a_plain_mean() -> None:
    scores = np.random.default_rng(0).normal(3, 2, 80)
    ours, theirs = ratio_interval(scores, np.ones(80)), mean_interval(scores)
    assert ours.low == pytest.approx(theirs.low, abs=0.06)
    assert ours.high == pytest.approx(theirs.high, abs=0.06)


def test_many_clusters_take_the_normal_limit() -> None:
    scores = np.random.default_rng(0).normal(3, 2, MANY)
    low, high = ratio_interval(scores, np.ones(MANY))
    assert (high - low) / 2 == pytest.approx(1.959964 * scores.std(ddof=1) / MANY**0.5)


def test_answers_that_are_all_the_same_count_once_for_each_cluster() -> None:
    codes = np.repeat(np.arange(12), 5)
    assert share_interval(np.zeros(60), codes) == wilson(0, 12)
    assert share_interval(np.ones(60), codes) == wilson(12, 12)


def test_copies_of_an_answer_are_worth_one() -> None:
    # Five copies of each of 40 answers: the design effect is 5 * 40 / 39.
    answers = np.repeat([1.0, 0.0, 0.0, 0.0], 10)
    sums, counts = cluster_totals(np.repeat(answers, 5), np.repeat(np.arange(40), 5))
    assert design_effect(sums, counts, 0.25 * 0.75) == pytest.approx(5 * 40 / 39)
    low, high = share_interval(np.repeat(answers, 5), np.repeat(np.arange(40), 5))
    alone = wilson(10, 40)
    assert low == pytest.approx(alone.low, abs=0.03)
    assert high == pytest.approx(alone.high, abs=0.03)


@given(st.integers(1, 9), st.data())
def test_at_k_is_the_mean_over_all_draws(n: int, data: st.DataObject) -> None:
    yes, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(itertools.combinations([i < yes for i in range(n)], k))
    assert float(at_k(yes, n, k)) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_the_cluster_interval_covers_and_wilson_does_not() -> None:
    rng = np.random.default_rng(3)
    codes, share, draws = np.repeat(np.arange(40), 7), 0.3, 250
    held = np.zeros(2)
    for _ in range(draws):
        chance = rng.beta(0.45, 1.05, 40)  # mean .3, correlation 1 / (1 + 1.5) = .4
        said = (rng.random((40, 7)) < chance[:, None]).astype(float).ravel()
        ends = share_interval(said, codes), wilson(int(said.sum()), 280)
        held += [low <= share <= high for low, high in ends]
    ours, alone = held / draws
    assert 0.93 <= ours <= 0.985  # 250 draws of .96: a standard error of .012
    assert alone < 0.85


def test_one_cluster_knows_nothing_and_two_know_little() -> None:
    assert share_interval(np.array([1.0, 0.0]), np.zeros(2)) == (0.0, 1.0)
    low, high = share_interval(np.array([1.0, 0.0, 0.0, 1.0]), np.array([0, 0, 1, 1]))
    assert (low, high) == pytest.approx((0.0, 1.0), abs=0.06)


def test_asr_at_k_covers_without_waste() -> None:
    rng = np.random.default_rng(4)
    held, width, draws = 0, 0.0, 300
    for _ in range(draws):
        yes = rng.binomial(20, rng.beta(0.5, 4, 100))  # mean chance 1 / 9
        low, high = share_interval(at_k(yes, np.full(100, 20), 1), np.arange(100), least=0.0)
        held += low <= 1 / 9 <= high
        width += (high - low) / draws
    assert 0.92 <= held / draws <= 0.985  # a standard error of .013
    # Var = 8/81 / 5.5 + within (chance (1 - chance) / 20): sd .139; +-1.98 sd / 10 = .055
    assert width == pytest.approx(0.056, abs=0.008)
