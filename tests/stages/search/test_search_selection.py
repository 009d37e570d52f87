"""Front and winner against their definitions, by brute force."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from searching import make_search

from qresafe.stages.search.ledger import Row
from qresafe.stages.search.selection import dominates, pareto_front, winner

NAMES = ("attack_success", "over_refusal", "utility_drop")


def rows(values: np.ndarray, **more: object) -> list[Row]:
    return [
        Row(index=i, params={"x": i}, status="completed", metrics=dict(zip(NAMES, v, strict=True)))
        for i, v in enumerate(values.tolist())
    ]


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_what_nobody_beats(tmp_path: Path, seed: int) -> None:
    search = make_search(tmp_path)
    # Of five levels each, so that there are ties in every objective.
    values = np.random.default_rng(seed).integers(0, 5, (40, 3)) / 4
    found = {row.index for row in pareto_front(rows(values), search.spec)}
    beaten = {
        i
        for i, j in itertools.permutations(range(40), 2)
        if (values[j] <= values[i]).all() and (values[j] < values[i]).any()
    }
    assert found == set(range(40)) - beaten


def test_equal_points_are_both_on_the_front(tmp_path: Path) -> None:
    search = make_search(tmp_path)
    front = pareto_front(rows(np.array([[0, 1, 0], [0, 1, 0], [1, 1, 1]])), search.spec)
    assert [row.index for row in front] == [0, 1]
    assert not dominates([0, 1], [0, 1])


def test_the_winner_has_the_smallest_weighted_sum(tmp_path: Path) -> None:
    weights = [{"metric": n, "weight": w} for n, w in zip(NAMES, (1, 2, 4), strict=True)]
    search = make_search(tmp_path, objectives=weights)
    # 1 x .5 + 2 x .1 + 4 x 0 = .7;  0 + 2 x .4 + 0 = .8;  0 + 0 + 4 x .2 = .8
    table = rows(np.array([[0.5, 0.1, 0], [0, 0.4, 0], [0, 0, 0.2]]))
    best = winner(table, search.spec)
    assert best is not None
    assert best.index == 0


def test_constraints_stops_failures_and_twins_do_not_win(tmp_path: Path) -> None:
    search = make_search(tmp_path, constraints=[{"metric": "over_refusal", "at_most": 0.2}])
    table = rows(np.array([[0, 0.3, 0], [0.5, 0.2, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]))
    table[2] = table[2].model_copy(update={"status": "stopped"})
    table[3] = table[3].model_copy(update={"status": "failed"})
    table[4] = table[4].model_copy(update={"same_as": 2})
    best = winner(table, search.spec)
    assert best is not None
    assert best.index == 1
    assert winner(table[:1], search.spec) is None
