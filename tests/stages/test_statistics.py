"""Statistics against closed forms, scipy's other routines, and brute force."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from qresafe.stages.statistics import (
    holm,
    mcnemar,
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
    before = [True, True, False, False, None, True]
    after = [True, False, True, False, True, None]
    assert paired_flips(before, after) == (4, 1, 1)


@pytest.mark.parametrize("n", [8, 40, 240, 520])
def test_minimum_detectable_effect_has_its_power(n: int) -> None:
    d = minimum_detectable_effect(n)
    k = next(k for k in range(1, 20) if mcnemar(0, k) <= 0.05)
    assert k == 6  # 2 / 2**6 = .031; 2 / 2**5 = .0625 is not enough
    assert stats.binom.sf(k - 1, n, d) == pytest.approx(0.8)


def test_too_few_prompts_detect_nothing() -> None:
    assert minimum_detectable_effect(5) == 1.0
