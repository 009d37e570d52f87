"""Searches that are killed: the driver at random moments, and a trial's process.

A file of its own, so that it runs beside test_search.py.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from ray import cloudpickle

from qresafe.dist.search import run_search
from qresafe.progress import Silent
from qresafe.search_spec import Search, load_search
from qresafe.stages.search.folder import REPORT, TRIALS, search_folder
from qresafe.stages.search.ledger import Ledger
from tests.tiny_search import start, untimed, write_space

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.mark.long
@pytest.mark.timeout(1500)  # four drivers, each with a Ray of its own
def test_a_search_killed_at_random_moments_ends_as_one_left_alone(
    tmp_path: Path, tiny_llama: Path
) -> None:
    spaces = []
    for name in ("alone", "killed"):
        (tmp_path / name).mkdir()
        spaces.append(
            write_space(
                tmp_path / name,
                tiny_llama,
                searcher={"name": "optuna", "startup": 2},
                scheduler={"name": "asha", "grace": 4, "factor": 2},
                budget={"trials": 4, "concurrent": 2},
                confirm=[0],
            )
        )
    alone, killed = spaces
    assert start(alone).wait(600) == 0, alone.with_suffix(".log").read_text()
    order, folder = random.Random(0), search_folder(load_search(killed))
    kills = 0
    for number in range(2):
        driver = start(killed)
        wanted = len(Ledger(folder).read()) + 1 + number % 2
        while driver.poll() is None and len(Ledger(folder).read()) < wanted:
            time.sleep(0.05)
        time.sleep(order.uniform(0, 0.5))
        kills += driver.poll() is None
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert kills >= 1
    assert start(killed, "--resume").wait(600) == 0, killed.with_suffix(".log").read_text()
    tables = [pq.read_table(str(search_folder(load_search(p)) / TRIALS)) for p in spaces]
    assert untimed(tables[0]) == untimed(tables[1])
    pages = [(search_folder(load_search(p)) / REPORT).exists() for p in spaces]
    assert pages == [True, True]


# ---------------------------------------------------------------- trials that die


def dying(mark: Path, index: int, times: int, real: Any) -> Any:
    """Return `make_trainable` whose trial `index` kills its own process so many times."""

    def make(search: Search) -> Any:
        trainable = real(search)

        def deadly(config: dict[str, Any]) -> None:
            if config["trial"] == index:
                deaths = len(mark.read_text()) if mark.exists() else 0
                if deaths < times:
                    mark.write_text("x" * (deaths + 1))
                    os.kill(os.getpid(), signal.SIGKILL)
            trainable(config)

        return deadly

    return make


@pytest.mark.long
@pytest.mark.parametrize("times", [1, 3])
def test_a_trial_whose_process_dies(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    from qresafe.dist import search as module

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    real = module.make_trainable
    monkeypatch.setattr(module, "make_trainable", dying(tmp_path / "mark", 1, times, real))
    path = write_space(tmp_path, tiny_llama, budget={"trials": 3, "concurrent": 1})
    search = load_search(path)
    run_search(search, Silent())
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    rows = list(Ledger(search_folder(search)).read().values())
    expected = "completed" if times == 1 else "failed"  # it is tried again twice
    assert [row.status for row in rows] == ["completed", expected, "completed"]
    if times == 3:
        assert (rows[1].kind, rows[1].reason) == (
            "killed",
            "the trial's process or node was lost again and again",
        )
