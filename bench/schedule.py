"""How busy 1,000 actors are kept: docs/reliability/schedule.md.

No machine here holds 1,000 actors, so their schedule is simulated: the real plan of batches, the
real rule of how many an actor holds, an engine of known latency, virtual time. The simulator is
compared with a real run on Ray of as many actors as the machine bears, whose engine sleeps.

    python -m bench.schedule                # about six minutes on two quiet cores
    python -m bench.schedule --actors 0     # the simulation alone, with costs that are assumed
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from upath import UPath

from bench.fake_engine import FakeJob, Latency, Lengths, LightStable, in_seconds
from bench.fleet import Costs, Schedule, simulate
from qresafe.dist import data
from qresafe.dist.runtime import connect
from qresafe.specs import ResourcesSpec
from qresafe.stages.generate import in_batches
from qresafe.stages.runtime import Batch, read_parts

PAGE = Path(__file__).parents[1] / "docs" / "reliability" / "schedule.md"
FLEET = 1_000
REAL = 16
BATCH = 16
EACH = (1, 2, 4, 8, 16)  # batches per actor
ASSUMED = Costs(driver=0.003, reply=0.2, gap=0.02)
LOADING = 60.0  # the fleet's actors become ready one after another within so many seconds
LOADS = {
    "chat": Lengths(),
    "half refusals": Lengths(refusals=0.5),
    "nearly all refusals": Lengths(refusals=0.97),
}
DRIVER_COSTS = (0.001, 0.003, 0.01, 0.03)
LATENCY = Latency()


@dataclass(frozen=True)
class Compared:
    """A real run beside its simulation.

    Attributes:
        load: Of `LOADS`.
        actors: That computed.
        batches: All of them.
        seconds: Mean of a batch.
        measured: Busy share of the real run.
        predicted: Of the simulation.
        without_costs: Of the simulation in which handing out costs nothing.
    """

    load: str
    actors: int
    batches: int
    seconds: float
    measured: float
    predicted: float
    without_costs: float


@dataclass(frozen=True)
class Cell:
    """The fleet's busy share for one load and number of batches.

    Attributes:
        load: Of `LOADS`.
        each: Batches per actor.
        seconds: Mean of a batch.
        ours: With the plan and the rule of `dist.data`.
        reserve: With a batch in reserve always, as it was.
        unplanned: With batches in the order of the rows.
    """

    load: str
    each: int
    seconds: float
    ours: float
    reserve: float
    unplanned: float


def main() -> None:
    """Measure, simulate, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--actors", type=int, default=REAL)
    actors = parser.parse_args().actors
    from bench.schedule_page import page

    costs, compared = against_reality(actors) if actors else (ASSUMED, [])
    cells = [cell(load, each, costs) for load in LOADS for each in EACH]
    driven = {cost: fleet_busy(_fleet_batches("chat", 8), Costs(cost)) for cost in DRIVER_COSTS}
    made = page(costs, compared, cells, driven)
    print(made)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(made)


def against_reality(actors: int) -> tuple[Costs, list[Compared]]:
    """Return what batches cost here, and real runs of so many actors beside their simulation."""
    with real_pool(actors) as run:
        costs = measure_costs(run)
        return costs, [compare(run, costs, load, actors, each) for load, each in _real_runs()]


def _real_runs() -> list[tuple[str, int]]:
    return [("chat", 4), ("half refusals", 8), ("nearly all refusals", 8)]


class RealPool:
    """Real runs of `dist.data` on light actors that sleep.

    Args:
        actors: The most at a time.
        stable: A `LightStable` actor.
    """

    def __init__(self, actors: int, stable: Any) -> None:
        self._stable = stable
        self._resources = ResourcesSpec(workers=actors, cpus_per_worker=0.01)

    def __call__(self, batches: Sequence[Batch], speed: float) -> list[dict[str, Any]]:
        """Return process, began and ended of each batch."""
        with tempfile.TemporaryDirectory() as folder:
            parts, job = UPath(folder), FakeJob(LATENCY, speed)
            made = data.compute(job, batches, parts, stable=self._stable, resources=self._resources)
            for _ in made:
                pass
            return read_parts(parts, len(batches)).to_pylist()

    def narrow(self, actors: int) -> RealPool:
        """Return a pool of fewer actors on the same engines."""
        return RealPool(actors, self._stable)


@contextmanager
def real_pool(actors: int) -> Iterator[RealPool]:
    """Start a local Ray with so many engines, all of them warm."""
    connect(None)
    try:
        stable = ray.remote(LightStable).options(num_cpus=0).remote(1, actors)
        node = ray.get_runtime_context().get_node_id()
        ray.get(stable.warm.remote(node, actors))
        pool = RealPool(actors, stable)
        pool(planned("chat", actors * 4, 1), 10.0)
        yield pool
    finally:
        ray.shutdown()


def measure_costs(pool: RealPool, batches: int = 300) -> Costs:
    """Return what a batch costs beside its computing, from batches that compute nothing.

    The driver's part is its CPU time, which other work on the machine does not change much; the
    waits are wall time, which it does.
    """
    few = pool.narrow(1)
    work = planned("chat", batches, 1)
    began = time.process_time()
    reserved = few(work, 1e9)
    driver = (time.process_time() - began) / batches
    single = few(work[: data.RESERVE_FROM - 1], 1e9)
    return Costs(driver, gap=_median_gap(reserved), reply=_median_gap(single) - driver)


def _median_gap(rows: Sequence[dict[str, Any]]) -> float:
    """Return the median time between two batches of one process."""
    ordered = sorted(rows, key=lambda row: row["began"])
    pairs = itertools.pairwise(ordered)
    return statistics.median(after["began"] - before["ended"] for before, after in pairs)


def compare(pool: RealPool, costs: Costs, load: str, actors: int, each: int) -> Compared:
    """Run real actors and simulate them, given when each of them was there."""
    batches = planned(load, actors * each, 8)
    speed = 2.0
    seconds = [value / speed for value in in_seconds(batches, LATENCY)]
    real = observed(pool(batches, speed))
    rule = data.in_flight(len(batches), actors)
    there = len(real.ready)
    return Compared(
        load,
        there,
        len(batches),
        statistics.mean(seconds),
        real.busy,
        simulate(seconds, real.ready, rule, costs).busy,
        simulate(seconds, real.ready, rule, Costs()).busy,
    )


def observed(rows: Sequence[dict[str, Any]]) -> Schedule:
    """Return the schedule of a real run; an actor was there when its first batch began."""
    zero = min(row["began"] for row in rows)
    first: dict[int, float] = {}
    for row in sorted(rows, key=lambda row: row["began"]):
        first.setdefault(row["process"], row["began"] - zero)
    number = {process: place for place, process in enumerate(first)}
    return Schedule(
        [number[row["process"]] for row in rows],
        [row["began"] - zero for row in rows],
        [row["ended"] - zero for row in rows],
        list(first.values()),
    )


def cell(load: str, each: int, costs: Costs) -> Cell:
    """Simulate the fleet with our policy and with two others."""
    rows = LOADS[load].requests(FLEET * each * BATCH)
    batches = in_batches(rows, BATCH)
    unplanned = [
        Batch(place, rows[start : start + BATCH])
        for place, start in enumerate(range(0, len(rows), BATCH))
    ]
    return Cell(
        load,
        each,
        statistics.mean(in_seconds(batches, LATENCY)),
        fleet_busy(batches, costs),
        fleet_busy(batches, costs, in_flight=2),
        fleet_busy(unplanned, costs),
    )


def fleet_busy(batches: Sequence[Batch], costs: Costs, in_flight: int | None = None) -> float:
    """Return the busy share of 1,000 actors that become ready within `LOADING` seconds."""
    ready = np.random.default_rng(1).uniform(0, LOADING, FLEET).tolist()
    held = in_flight or data.in_flight(len(batches), FLEET)
    return simulate(in_seconds(batches, LATENCY), ready, held, costs).busy


def planned(load: str, batches: int, batch_size: int) -> list[Batch]:
    """Return the generate stage's batches of a load."""
    return in_batches(LOADS[load].requests(batches * batch_size), batch_size)


def _fleet_batches(load: str, each: int) -> list[Batch]:
    return planned(load, FLEET * each, BATCH)


if __name__ == "__main__":
    main()
