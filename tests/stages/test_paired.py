"""Tango's interval against a likelihood maximised by brute force, and its n by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from qresafe.stages.paired import change_of, required_pairs, score_interval
from qresafe.stages.statistics import wilson

Z = 1.959963984540054


def score(gained: int, lost: int, n: int, change: float) -> float:
    """Return the score statistic, its nuisance parameter found by maximising the likelihood."""

    def loss(p_lost: float) -> float:
        chances = (p_lost + change, p_lost, 1 - 2 * p_lost - change)
        counts = (gained, lost, n - gained - lost)
        told = zip(counts, chances, strict=True)
        return -sum(k * math.log(max(p, 1e-300)) for k, p in told if k)

    inside = (max(0.0, -change), (1 - change) / 2)
    p_lost = optimize.minimize_scalar(loss, bounds=inside, options={"xatol": 1e-12}).x
    variance = n * (2 * p_lost + change - change**2)
    return (gained - lost - n * change) / math.sqrt(variance)


@settings(max_examples=40, deadline=None)
@given(st.integers(5, 200), st.data())
def test_the_ends_are_where_the_score_test_turns(n: int, data: st.DataObject) -> None:
    gained = data.draw(st.integers(1, n // 2))
    lost = data.draw(st.integers(1, n // 2))
    low, high = score_interval(gained, lost, n)
    assert low < (gained - lost) / n < high
    assert score(gained, lost, n, low) == pytest.approx(Z, abs=2e-3)
    assert score(gained, lost, n, high) == pytest.approx(-Z, abs=2e-3)


def test_no_change_is_mcnemars_chi_square() -> None:
    # (b - c)^2 / (b + c) = 8^2 / 24 = 2.667 < z^2: 0 is inside; 10^2 / 24 = 4.17 > z^2: outside.
    assert score_interval(16, 8, 100).low < 0
    assert score_interval(17, 7, 100).low > 0


@pytest.mark.parametrize("n", [20, 189, 520])
def test_no_flips_at_all_leave_what_wilson_leaves(n: int) -> None:
    low, high = score_interval(0, 0, n)
    assert high == pytest.approx(wilson(0, n).high)
    assert low == pytest.approx(-high)


def test_nothing_but_flips() -> None:
    # Without losses the fitted variance is 1 - d^2, so n (1 - d)^2 = z^2 (1 - d^2).
    assert score_interval(50, 0, 50) == pytest.approx((1 - 2 * Z**2 / (50 + Z**2), 1.0))
    assert score_interval(0, 50, 50)[0] == -1.0


def test_the_interval_covers() -> None:
    rng = np.random.default_rng(0)
    draws = rng.multinomial(200, [0.08, 0.03, 0.89], 3000)
    kinds, times = np.unique(draws, axis=0, return_counts=True)
    held = [score_interval(up, down, 200) for up, down, _ in kinds]
    covered = sum(c for c, (low, high) in zip(times, held, strict=True) if low <= 0.05 <= high)
    assert 0.93 <= covered / 3000 <= 0.97


def test_prompts_that_stand_alone_need_no_clusters() -> None:
    before, after = np.zeros(40), np.repeat([1.0, 0.0], 20)
    alone = change_of(before, after)
    assert change_of(before, after, np.arange(40)) == alone
    assert (alone.low, alone.high) == score_interval(20, 0, 40)
    assert (alone.difference, alone.method, alone.effective) == (0.5, "score", 40)


def test_a_few_changed_clusters_count_once_each() -> None:
    # 30 clusters of 4; one of them changes: as if 1 of 30 prompts had.
    codes = np.repeat(np.arange(30), 4)
    after = (codes == 0).astype(float)
    found = change_of(np.zeros(120), after, codes)
    assert found.method == "score, clusters as one"
    assert (found.low, found.high) == score_interval(1, 0, 30)
    unchanged = change_of(np.zeros(120), np.zeros(120), codes)
    assert unchanged.high == pytest.approx(wilson(0, 30).high)


def test_clusters_widen_the_interval() -> None:
    rng = np.random.default_rng(1)
    codes = np.repeat(np.arange(50), 6)
    after = np.repeat(rng.random(50) < 0.4, 6).astype(float)  # a cluster changes whole
    found = change_of(np.zeros(300), after, codes)
    assert found.method == "cluster bootstrap"
    plain = score_interval(after.sum(), 0, 300)
    assert (found.high - found.low) > 2 * (plain.high - plain.low)
    assert 35 < found.effective < 65  # about one for each of the 50 clusters


def test_the_n_of_a_threshold() -> None:
    # No flips: the upper end z^2 / (n + z^2) <= .02 from n = z^2 * .98 / .02 = 188.2 on.
    assert required_pairs(0.02) == 189
    assert score_interval(0, 0, 189).high <= 0.02 < score_interval(0, 0, 188).high
    assert required_pairs(0.02, difference=0.02, discordant=0.1) is None


@pytest.mark.parametrize(("truth", "wanted"), [(0.0, "pass"), (0.12, "fail")])
def test_the_n_decides_four_times_in_five(truth: float, wanted: str) -> None:
    discordant, threshold = 0.16, 0.05
    n = required_pairs(threshold, truth, discordant)
    assert n is not None
    up, down = (discordant + truth) / 2, (discordant - truth) / 2
    draws = np.random.default_rng(2).multinomial(n, [up, down, 1 - discordant], 2000)
    kinds, times = np.unique(draws, axis=0, return_counts=True)
    ends = [score_interval(u, d, n) for u, d, _ in kinds]
    decides = [(e.high <= threshold) if wanted == "pass" else (e.low > threshold) for e in ends]
    assert 0.75 <= (times * decides).sum() / 2000 <= 0.85
