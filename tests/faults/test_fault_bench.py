"""The harness of `make bench-faults`: what it compares, plans and writes."""

from __future__ import annotations

import itertools

from bench.fault_kinds import kinds_for
from bench.fault_page import page
from bench.fault_runs import WORKLOADS, Difference, difference
from bench.faults import Result, plan


def test_lost_doubled_and_changed_rows_are_seen() -> None:
    expected = [("a", 1), ("b", 2), ("c", 3)]
    assert not difference(expected, [("c", 3), ("a", 1), ("b", 2)])
    assert difference(expected, [("a", 1), ("c", 3)]) == Difference(lost=1)
    assert difference(expected, [*expected, ("b", 2)]) == Difference(doubled=1)
    assert difference(expected, [("a", 1), ("b", 9), ("c", 3)]) == Difference(changed=1)
    assert difference(expected, []) == Difference(lost=3)


def test_the_plan_is_the_same_for_a_seed_and_holds_every_kind() -> None:
    every = sum(len(kinds_for(workload)) for workload in WORKLOADS.values())
    rounds = []
    for seed in (0, 0, 1):
        first = itertools.islice(plan(seed), every)
        rounds.append([(workload.name, kind, draw.random()) for workload, kind, draw in first])
    assert rounds[0] == rounds[1] != rounds[2]
    assert len({(name, kind) for name, kind, _ in rounds[0]}) == every == 30


def test_the_page_counts_what_did_not_survive() -> None:
    def result(kind: str, **changes: object) -> Result:
        base = {"workload": "patch", "kind": kind, "hit": "1", "after": 1.0, "runs": 1, "hangs": 0,
                "ended": True, "difference": Difference(), "seconds": 12.0, "baseline": 10.0,
                "said": []}  # fmt: skip
        return Result(**(base | changes))

    results = [
        result("driver killed", runs=2, seconds=15.0),
        result("driver killed", difference=Difference(lost=2), said=["a | sentence"]),
        result("actor killed", ended=False, runs=6, hangs=6),
    ]
    text = page(results, seed=7)
    assert "1 of 3 faults (3 in patch) ended in the fault-free result; 2 rows" in text
    assert "| driver killed | 2 | 1 | 0 | 0 | 2 | 0 | 0 | 4 s (5 s) |" in text  # of 5 and 2 s: 3.5
    assert "| actor killed | 1 | 0 | 0 | 6 | 0 | 0 | 0 | 2 s (2 s) |" in text
