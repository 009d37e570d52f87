"""Safety minus utility against sorted lists."""

from __future__ import annotations

import pytest
import torch

from qresafe.core.masks import random_scores, top_fraction
from qresafe.core.set_difference import set_difference
from qresafe.errors import ModelError

SHAPES = {"a": torch.Size((7, 5)), "b": torch.Size((3, 11))}  # 68 weights


def test_utilitys_top_is_left_out_and_the_rest_keeps_its_order() -> None:
    safety, utility = random_scores(SHAPES, seed=1), random_scores(SHAPES, seed=2)
    by_utility = sorted(((utility[n][i], n, i) for n in SHAPES for i in places(n)), reverse=True)
    taken = {(name, index) for _, name, index in by_utility[:17]}  # round(.25 * 68)
    left = [(safety[n][i], n, i) for n in SHAPES for i in places(n) if (n, i) not in taken]
    wanted = {(name, index) for _, name, index in sorted(left, reverse=True)[:7]}  # round(.1 * 68)
    masks = top_fraction(set_difference(safety, utility, utility_tau=0.25), 0.1)
    assert {(n, i) for n in SHAPES for i in places(n) if masks[n][i]} == wanted


def test_nothing_taken_is_the_safety_mask_itself() -> None:
    safety = random_scores(SHAPES, seed=1)
    found = set_difference(safety, random_scores(SHAPES, seed=2), utility_tau=0.0)
    assert all(torch.equal(found[name], safety[name]) for name in SHAPES)


def test_a_score_that_is_no_number_is_named() -> None:
    utility = {name: torch.full(shape, torch.nan) for name, shape in SHAPES.items()}
    with pytest.raises(ModelError, match="layer 'a'"):
        set_difference(random_scores(SHAPES, seed=1), utility, utility_tau=0.5)


def places(name: str) -> list[tuple[int, int]]:
    rows, columns = SHAPES[name]
    return [(row, column) for row in range(rows) for column in range(columns)]
