"""Agreement and corrected rates, beside hand arithmetic, an independent library and simulation."""

from __future__ import annotations

import random

import numpy as np
import pytest
from fabricated import GIBBERISH, REFUSAL, arm, row

from qresafe.artifacts import Run
from qresafe.progress import Silent
from qresafe.records import OUTCOMES
from qresafe.stages.agreement import (
    ErrorRates,
    between_judges,
    cohen_kappa,
    error_rates,
    rogan_gladen,
)
from qresafe.stages.compare import compare, read_comparison


def test_kappa_by_hand() -> None:
    # 50 items: 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no. Observed 35/50 = .7; by chance
    # 25/50 * 30/50 + 25/50 * 20/50 = .5; kappa = .2 / .5.
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa(first, first) == 1.0
    assert cohen_kappa(["a"] * 3, ["a"] * 3) is None
    assert cohen_kappa([], []) is None


def test_kappa_is_that_of_another_library() -> None:
    from nltk.metrics.agreement import AnnotationTask

    draw = random.Random(0)
    for _ in range(20):
        first = [draw.choice("abc") for _ in range(40)]
        second = [a if draw.random() < 0.6 else draw.choice("abc") for a in first]
        triples = [("1", i, a) for i, a in enumerate(first)]
        triples += [("2", i, b) for i, b in enumerate(second)]
        assert cohen_kappa(first, second) == pytest.approx(AnnotationTask(triples).kappa())


def test_both_kinds_of_refusal_are_one_and_the_undecided_are_left_out() -> None:
    said = {
        "a": ["refused", "partial", "complied", "undecided", "complied"],
        "b": ["partial", "refused", "complied", "complied", "refused"],
    }
    codes = {judge: np.array([OUTCOMES.index(one) for one in all_]) for judge, all_ in said.items()}
    (found,) = between_judges("W", codes)
    assert (found.first, found.second, found.n, found.same) == ("a", "b", 4, 3)
    # Observed 3/4; by chance 2/4 * 3/4 + 2/4 * 1/4 = 1/2; kappa = (1/4) / (1/2).
    assert found.kappa == pytest.approx(0.5)


def test_the_comparison_says_how_far_its_judges_agree(tmp_path) -> None:
    rows = [row("harmful", i, text) for i, text in enumerate([REFUSAL, GIBBERISH, "Take it."])]
    run = Run(str(tmp_path), "t")
    found = read_comparison(compare(run, {"Q": arm(run, "Q", rows)}, Silent()))
    # Gibberish is compliance for `keyword` alone.
    assert [(a.arm, a.n, a.same) for a in found.agreement] == [("Q", 3, 2)]


def test_rogan_gladen_by_hand() -> None:
    rates = ErrorRates(hits=45, misses=5, false_alarms=10, rejections=90)
    assert (rates.sensitivity, rates.specificity) == (0.9, 0.9)
    # 100 of 500 called complied: (.2 + .9 - 1) / (.9 + .9 - 1) = .1 / .8
    found = rogan_gladen(100, 500, rates)
    assert found is not None
    assert found.rate == pytest.approx(0.125)
    assert found.low < found.rate < found.high


def test_nothing_is_corrected_by_labels_that_do_not_allow_it() -> None:
    assert rogan_gladen(0, 0, ErrorRates(5, 0, 0, 5)) is None
    assert rogan_gladen(1, 2, ErrorRates(0, 0, 1, 5)) is None  # nobody complied
    assert rogan_gladen(1, 2, ErrorRates(5, 5, 5, 5)) is None  # no better than a coin


def test_an_almost_perfect_judge_is_hardly_corrected() -> None:
    found = rogan_gladen(300, 1000, ErrorRates(100_000, 0, 0, 100_000))
    assert found is not None
    assert found.rate == pytest.approx(0.3)
    assert found.low == pytest.approx(0.2724, abs=0.001)  # Wilson's interval: .2724, .3291
    assert found.high == pytest.approx(0.3291, abs=0.001)


@pytest.mark.parametrize(("rate", "se", "sp"), [(0.2, 0.9, 0.95), (0.5, 0.95, 0.9)])
def test_the_interval_covers(rate: float, se: float, sp: float) -> None:
    """2,000 repetitions: the standard error of a coverage of 95 % is .5 points."""
    draw = np.random.default_rng(0)
    apparent = rate * se + (1 - rate) * (1 - sp)
    inside = []
    for _ in range(2000):
        called, hits = draw.binomial(500, apparent), draw.binomial(60, se)
        rejections = draw.binomial(80, sp)
        rates = ErrorRates(int(hits), 60 - int(hits), 80 - int(rejections), int(rejections))
        found = rogan_gladen(int(called), 500, rates)
        assert found is not None
        inside.append(found.low <= rate <= found.high)
    assert 0.94 <= np.mean(inside) <= 0.98  # Lang and Reiczigel: at least nominal, a little wide


def test_error_rates_count_complied() -> None:
    judged = ["complied", "refused", "complied", "incoherent"]
    people = ["complied", "complied", "refused", "refused"]
    assert error_rates(judged, people) == ErrorRates(1, 1, 1, 1)
