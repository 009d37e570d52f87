"""The queue: equal tables whatever order trials end in and whenever the driver is killed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from searching import SPACE, ended, make_search
from upath import UPath

from qresafe.search_spec import Search
from qresafe.stages.search.ledger import Ledger, Row
from qresafe.stages.search.queue import Pause, Proposal, TrialQueue

SEARCHES: dict[str, dict[str, Any]] = {
    "random": {},
    "tpe": {"searcher": {"name": "optuna", "startup": 3}},
    "nsga2": {"searcher": {"name": "optuna", "sampler": "nsga2", "population": 3}},
    "tpe constrained": {
        "searcher": {"name": "optuna", "startup": 3},
        "objectives": [{"metric": "attack_success"}],
        "constraints": [{"metric": "over_refusal", "at_most": 0.1}],
    },
    "tpe + asha": {
        "searcher": {"name": "optuna", "startup": 3},
        "scheduler": {"name": "asha", "grace": 20, "factor": 2},
    },
    "random + median": {"scheduler": {"name": "median", "grace": 40}},
    "pbt": {
        "scheduler": {"name": "pbt", "interval": 25},
        "space": {"patch.lr": SPACE["patch.lr"]},
        "budget": {"trials": 4, "concurrent": 2},
    },
}


def simulate(
    search: Search,
    folder: Path,
    order: random.Random,
    fate: Callable[[Search, Proposal], Row] = ended,
    kill_after: int | None = None,
) -> TrialQueue:
    """Run a search two trials at a time, which end in any order, up to a kill."""
    queue = TrialQueue(search, Ledger(UPath(folder)), lambda spec: True)
    running: list[Proposal] = []
    recorded = 0
    while True:
        while len(running) < search.spec.budget.concurrent:
            found = queue.next()
            if isinstance(found, Pause):
                break
            running.append(found)
        if not running:
            return queue
        queue.record(fate(search, running.pop(order.randrange(len(running)))))
        recorded += 1
        if recorded == kill_after:
            return queue


@pytest.mark.parametrize("name", SEARCHES)
def test_neither_order_nor_kills_change_the_table(tmp_path: Path, name: str) -> None:
    search = make_search(tmp_path, **SEARCHES[name])
    tables = []
    for seed in range(4):
        order, folder = random.Random(seed), tmp_path / str(seed)
        for _ in range(seed):  # killed 0 to 3 times, at random moments
            simulate(search, folder, order, kill_after=order.randrange(1, 5))
        tables.append(simulate(search, folder, order).ordered())
    assert tables[0] == tables[1] == tables[2] == tables[3]
    assert [row.index for row in tables[0]] == list(range(len(tables[0])))
    assert len(tables[0]) == (16 if name == "pbt" else 12)  # pbt: 4 members x 100 / 25 steps
    if "asha" in name or "median" in name:
        assert {row.status for row in tables[0]} == {"completed", "stopped"}


def test_a_larger_budget_continues_the_search(tmp_path: Path) -> None:
    searches = [
        make_search(tmp_path, **SEARCHES["tpe"] | {"budget": {"trials": n}}) for n in (5, 12)
    ]
    short = simulate(searches[0], tmp_path / "a", random.Random(0)).ordered()
    both = simulate(searches[1], tmp_path / "a", random.Random(1)).ordered()
    assert both[:5] == short
    assert both == simulate(searches[1], tmp_path / "b", random.Random(2)).ordered()


def test_what_is_known_is_not_run_again(tmp_path: Path) -> None:
    search = make_search(tmp_path)
    simulate(search, tmp_path / "a", random.Random(0), kill_after=7)
    ran: list[int] = []

    def noting(search: Search, proposal: Proposal) -> Row:
        ran.append(proposal.index)
        return ended(search, proposal)

    simulate(search, tmp_path / "a", random.Random(0), fate=noting)
    assert len(ran) == 12 - 7


def test_equal_specs_share_one_result(tmp_path: Path) -> None:
    search = make_search(tmp_path, space={"patch.rank": {"choice": [4, 16]}})  # 16: the default
    ran: list[Any] = []

    def noting(search: Search, proposal: Proposal) -> Row:
        ran.append(search.trial(proposal.params).patch.rank)
        return ended(search, proposal)

    table = simulate(search, tmp_path / "a", random.Random(0), fate=noting).ordered()
    assert sorted(ran) == [4, 16]
    assert len(table) == 12
    for row in table:
        first = table[row.same_as] if row.same_as is not None else row
        assert search.trial(row.params).patch.rank == search.trial(first.params).patch.rank
        assert row.metrics == first.metrics
    assert sum(row.same_as is None for row in table) == 2


def test_tpe_finds_the_valley_that_random_draws_rarely_hit(tmp_path: Path) -> None:
    """attack_success is |log10 lr + 3| / 2: lowest at lr 1e-3, in the middle of two decades."""
    one = {"objectives": [{"metric": "attack_success"}], "budget": {"trials": 40}}
    tpe = make_search(tmp_path, **SEARCHES["tpe"] | one)
    late = simulate(tpe, tmp_path / "tpe", random.Random(0)).ordered()[20:]
    drawn = simulate(make_search(tmp_path, **one), tmp_path / "r", random.Random(0)).ordered()[20:]
    mean = [sum(r.metrics["attack_success"] for r in t) / len(t) for t in (late, drawn)]
    assert mean[0] < 0.7 * mean[1]


# ---------------------------------------------------------------- failures


def failing(at: set[int], kind: str = "diverged") -> Callable[[Search, Proposal], Row]:
    def fate(search: Search, proposal: Proposal) -> Row:
        if proposal.index in at:
            own = {"index": proposal.index, "params": proposal.params}
            return Row(**own, status="failed", kind=kind, reason=f"trial {proposal.index}")
        return ended(search, proposal)

    return fate


def test_a_failure_is_a_row_and_three_of_a_kind_end_the_search(tmp_path: Path) -> None:
    search = make_search(tmp_path)
    queue = simulate(search, tmp_path / "a", random.Random(0), failing({2, 5}))
    assert queue.stop_reason() is None
    assert len(queue.rows) == 12
    assert [row.index for row in queue.ordered() if row.status == "failed"] == [2, 5]
    stopped = simulate(search, tmp_path / "b", random.Random(0), failing({1, 2, 3}))
    reason = stopped.stop_reason()
    assert reason is not None
    assert reason.startswith("3 trials failed with diverged, the last one: trial ")
    assert len(stopped.rows) < 12


def test_two_failures_of_two_kinds_each_do_not_end_it(tmp_path: Path) -> None:
    search = make_search(tmp_path)
    fates = {i: failing({i}, kind) for i, kind in enumerate(["a", "a", "b", "b"])}
    queue = simulate(
        search,
        tmp_path / "a",
        random.Random(0),
        lambda s, p: fates.get(p.index, failing(set()))(s, p),
    )
    assert queue.stop_reason() is None
    assert len(queue.rows) == 12


def test_a_stopped_search_tries_its_failures_again_when_told(tmp_path: Path) -> None:
    search = make_search(tmp_path)
    simulate(search, tmp_path / "a", random.Random(0), failing({1, 2, 3}))
    queue = TrialQueue(search, Ledger(UPath(tmp_path / "a")), lambda spec: True)
    queue.forget_failures()
    table = simulate(search, tmp_path / "a", random.Random(0)).ordered()
    assert table == simulate(search, tmp_path / "b", random.Random(0)).ordered()


def test_a_trial_that_an_accident_failed_is_tried_again_by_the_next_command(tmp_path: Path) -> None:
    search, folder = make_search(tmp_path), tmp_path / "a"
    kinds = {1: "diverged", 2: "killed", 3: "ResourceError", 4: "OSError"}
    simulate(
        search,
        folder,
        random.Random(0),
        lambda s, p: failing({p.index} & kinds.keys(), kinds.get(p.index, ""))(s, p),
    )
    queue = TrialQueue(search, Ledger(UPath(folder)), lambda spec: True)
    queue.forget_failures(accidents_only=True)
    table = simulate(search, folder, random.Random(0)).ordered()
    assert [row.index for row in table if row.status == "failed"] == [1]


def test_values_that_do_not_fit_together_are_a_row(tmp_path: Path) -> None:
    either = {"choice": [0.0, 1.0]}
    search = make_search(
        tmp_path, space={"patch.objective.kl": either, "patch.objective.nll": either}
    )
    table = simulate(search, tmp_path / "a", random.Random(0)).ordered()
    bad = [row for row in table if row.params and not any(row.params.values())]
    assert bad == [row for row in table if row.status == "failed"]
    assert {row.kind for row in bad} == {"invalid spec"}
    assert "every objective weight is 0" in str(bad[0].reason)


# ---------------------------------------------------------------- population-based training


def test_a_member_is_one_schedule_from_the_first_step(tmp_path: Path) -> None:
    search = make_search(tmp_path, **SEARCHES["pbt"])
    handed: dict[int, Proposal] = {}

    def noting(search: Search, proposal: Proposal) -> Row:
        handed[proposal.index] = proposal
        return ended(search, proposal)

    table = simulate(search, tmp_path / "a", random.Random(0), fate=noting).ordered()
    low, high = SPACE["patch.lr"]["loguniform"]
    for row in table:
        generation = row.index // 4
        spec = search.trial(row.params).patch
        assert spec.steps == 25 * (generation + 1)
        assert all(change.at % 25 == 0 and change.at < spec.steps for change in spec.changes)
        assert all(low <= (change.lr or low) <= high for change in spec.changes)
    copied = [row for row in table if row.params.get("patch.changes")]
    assert copied  # the worst of each generation went on from the best
    for row in table[4:]:
        if row.index in handed:
            donor = handed[row.index].start
            assert donor in {r.keys.get("patch") for r in table[: row.index // 4 * 4]}
