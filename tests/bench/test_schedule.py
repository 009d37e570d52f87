"""The simulator of the batch schedule, by hand and against an independent reckoning."""

from __future__ import annotations

import random

import pytest

from bench.fake_engine import Latency, Lengths
from bench.fleet import Costs, simulate
from qresafe.dist.data import RESERVE_FROM, in_flight
from qresafe.stages.generate import in_batches


def test_the_next_batch_goes_to_whoever_is_free() -> None:
    # The first takes 3 s, and the other actor the three short ones meanwhile: nobody waits.
    made = simulate([3, 1, 1, 1], [0, 0], 1, Costs())
    assert made.actor == [0, 1, 1, 1]
    assert (made.end, made.busy) == (3, 1)


def test_a_batch_in_reserve_waits_behind_a_long_one() -> None:
    # Actor 0 is heard of first and gets two: the second runs from 3 to 4; actor 1 ends at 2.
    made = simulate([3, 1, 1, 1], [0, 0], 2, Costs())
    assert made.actor == [0, 0, 1, 1]
    assert made.end == 4
    assert made.busy == 6 / 8


def test_costs_count_once_per_batch() -> None:
    # Alone, a batch of 1 s begins 0.5 s of driver's work after the news of the one before, which
    # takes 0.25 s: the first ends at 1.5, each of the nine others 1.75 s later.
    alone = simulate([1] * 10, [0], 1, Costs(driver=0.5, reply=0.25))
    assert alone.end == pytest.approx(1.5 + 9 * 1.75)
    assert alone.busy == pytest.approx(10 / 17.25)
    # With one in reserve, the driver's work and the news are hidden; the actor's own gap is not.
    reserved = simulate([1] * 10, [0], 2, Costs(driver=0.5, reply=0.25, gap=0.1))
    assert reserved.end == pytest.approx(1.5 + 9 * 1.1)


def test_an_actor_that_comes_too_late_is_not_idle() -> None:
    made = simulate([1, 1], [0, 10], 2, Costs())
    assert (made.actor, made.busy) == ([0, 0], 1)


def test_one_driver_serves_all_actors() -> None:
    # 100 actors finish a batch every second, but the driver hands out 10 a second.
    made = simulate([1.0] * 1000, [0.0] * 100, 1, Costs(driver=0.1))
    assert made.end == pytest.approx(1000 * 0.1 + 1)


def test_without_costs_it_is_list_scheduling() -> None:
    draw = random.Random(0)
    seconds = [draw.uniform(0.1, 5) for _ in range(300)]
    ready = [draw.uniform(0, 8) for _ in range(20)]
    free, ended = list(ready), []
    for each in seconds:
        first = min(range(len(free)), key=free.__getitem__)
        free[first] += each
        ended.append(free[first])
    made = simulate(seconds, ready, 1, Costs())
    assert made.ended == pytest.approx(ended)


def test_few_batches_per_actor_are_not_promised_ahead() -> None:
    assert in_flight(RESERVE_FROM * 4 - 1, 4) == 1
    assert in_flight(RESERVE_FROM * 4, 4) == 2


def test_the_plan_holds_every_row_once_the_longest_first() -> None:
    rows = Lengths().requests(100)
    batches = in_batches(rows, 8)
    assert sorted(row["prompt_id"] for batch in batches for row in batch.rows) == sorted(
        row["prompt_id"] for row in rows
    )
    longest = [max(row["size"] for row in batch.rows) for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_latency_is_reading_and_steps() -> None:
    rows = [{"size": 10, "answer_tokens": 3}, {"size": 4, "answer_tokens": 7}]
    # 2 rows padded to 10 tokens at 1 s each, and 7 steps of 0.5 s
    assert Latency(per_prompt_token=1, per_step=0.5).seconds(rows) == 2 * 10 + 7 * 0.5
