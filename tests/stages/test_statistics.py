"""Statistics against closed forms, scipy's other routines, and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from qresafe.stages.statistics import (
    holm,
    mcnemar,
    mean_interval,
    minimum_detectable_effect,
    paired_flips,
    wilson,
)


@given(st.integers(1, 500), st.data())
def test_wilson_is_the_closed_form(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    z, p = 1.959963984540054, k / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = wilson(k, n)
    assert low == pytest.approx(max(0.0, middle - half), abs=1e-9)
    assert high == pytest.approx(min(1.0, middle + half), abs=1e-9)


def test_wilson_of_nothing_knows_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 240).high == pytest.approx(0.01575, abs=1e-4)  # z^2 / (n + z^2) = 3.84/243.84


@given(st.integers(0, 12), st.integers(0, 12))
def test_mcnemar_is_the_sum_over_all_outcomes(gained: int, lost: int) -> None:
    flips = gained + lost
    chance = [math.comb(flips, k) / 2**flips for k in range(flips + 1)]
    as_extreme = sum(c for c in chance if c <= chance[gained] * (1 + 1e-9))
    assert mcnemar(gained, lost) == pytest.approx(as_extreme)


def test_mcnemar_by_hand() -> None:
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(1, 5) == pytest.approx(2 * (1 + 6) / 64)
    assert mcnemar(0, 0) == 1.0


@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_is_the_closure_of_bonferroni(p: list[float]) -> None:
    # Closed testing: hypothesis i is rejected at a iff every subset that holds i is rejected by
    # Bonferroni; so its adjusted p is the largest over these subsets of |S| * min p, capped at 1.
    expected = []
    for i in range(len(p)):
        subsets = itertools.chain.from_iterable(
            itertools.combinations(range(len(p)), size) for size in range(1, len(p) + 1)
        )
        worst = max(min(1.0, len(s) * min(p[j] for j in s)) for s in subsets if i in s)
        expected.append(worst)
    assert holm(p) == pytest.approx(expected)


def test_flips_leave_out_the_undecided() -> None:
    before = np.array([1, 1, 0, 0, -1, 1])
    after = np.array([1, 0, 1, 0, 1, -1])
    assert paired_flips(before, after) == (4, 1, 1)


@pytest.mark.parametrize("n", [8, 40, 240, 520])
def test_minimum_detectable_effect_has_its_power(n: int) -> None:
    d = minimum_detectable_effect(n)
    k = next(k for k in range(1, 20) if mcnemar(0, k) <= 0.05)
    assert k == 6  # 2 / 2**6 = .031; 2 / 2**5 = .0625 is not enough
    assert stats.binom.sf(k - 1, n, d) == pytest.approx(0.8)


def test_too_few_prompts_detect_nothing() -> None:
    assert minimum_detectable_effect(5) == 1.0


def test_wilsons_coverage_by_share_and_n() -> None:
    """Exact coverage, summed over all outcomes: inside 93-97 % in the middle, not at the edge."""
    for n, share in ((50, 0.5), (100, 0.3), (300, 0.05), (520, 0.1)):
        assert 0.93 <= coverage(n, share) <= 0.97
    assert coverage(20, 0.005) < 0.93  # as it is: 0 of 20 says 0-16 %, 1 of 20 begins at .9 %


def coverage(n: int, share: float) -> float:
    ends = [wilson(k, n) for k in range(n + 1)]
    held = [k for k, (low, high) in enumerate(ends) if low <= share <= high]
    return float(stats.binom.pmf(held, n, share).sum())


def test_a_means_interval_covers() -> None:
    rng = np.random.default_rng(0)
    ends = [mean_interval(rng.beta(4, 1, 60)) for _ in range(2000)]  # mean .8
    assert 0.93 <= sum(low <= 0.8 <= high for low, high in ends) / 2000 <= 0.97


def test_mcnemar_and_holm_keep_their_level() -> None:
    rng = np.random.default_rng(1)
    flips = rng.binomial(300, 0.05, 1000)
    false = [
        mcnemar(int(up), int(n - up)) <= 0.05
        for up, n in zip(rng.binomial(flips, 0.5), flips, strict=True)
    ]
    assert sum(false) / 1000 <= 0.06
    family = [min(holm(list(rng.random(12)))) <= 0.05 for _ in range(2000)]
    assert 0.03 <= sum(family) / 2000 <= 0.065
