"""Warm worker processes of one session, lent to the actor pool of each Ray Data job.

A new actor of Ray Data's pool starts in about a second; importing torch and transformers and
loading a model takes several more, for every stage. So a pool actor (a `Lease`, see `data.py`)
holds the CPU or GPU while its job runs, and the work is done by an engine: a process that holds
no Ray resources, stays when the pool is gone, and finds everything imported and often the model
loaded when the next stage borrows it. Training gets all CPUs, as idle engines hold none.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from upath import UPath

from qresafe.dist.metrics import send_to_ray
from qresafe.hf import spread
from qresafe.process_log import logged
from qresafe.stages.runtime import Batch, BatchFunction, BatchJob, Row, compute_part, cpu_threads

# A batch whose worker died so often is not tried again: most likely it needs too much memory.
TRIES_PER_BATCH = 4
REST_SECONDS = 60  # for engines whose node goes just then


class Engine:
    """One warm process; runs the batches of one borrower at a time.

    Args:
        gpus: CUDA device numbers as in CUDA_VISIBLE_DEVICES, or "" for the CPU.
        threads: CPU threads of every computation, equal on all engines so that results are too.
        number: Which of its session's engines it is; its log has it in its name.
    """

    def __init__(self, gpus: str, threads: int, number: int) -> None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus  # has its effect when CUDA starts
        self._device, self._threads = spread.gpus(len(gpus.split(",")) if gpus else 0), threads
        self._number = number
        self._call = ""
        self._function: BatchFunction | None = None
        send_to_ray()

        import qresafe.hf.generate
        import qresafe.hf.warm  # noqa: F401

    def compute(self, call: str, job: BatchJob, batch: str, parts: UPath) -> Row:
        """Compute one batch and write its part.

        Args:
            call: Names the `map_batches` call; the job is set up once per call.
            job: What to compute.
            batch: `dump_batch` of the batch.
            parts: Where the part goes.

        Returns:
            `Made.row()` of the part.
        """
        with logged(parts, self._number), cpu_threads(self._threads):
            if self._function is None or call != self._call:
                self._function, self._call = job.setup(self._device), call
            return compute_part(self._function, load_batch(batch), parts).row()

    def rest(self) -> None:
        """Give back all memory that models hold."""
        from qresafe.hf.warm import shelf

        self._function = None
        shelf().clear()


@dataclass(frozen=True)
class Loan:
    """An engine that is lent.

    Attributes:
        place: (node, GPUs).
        engine: Its handle.
        call: What it works for.
    """

    place: tuple[str, str]
    engine: Any
    call: str


@dataclass
class Stable:
    """Owns the engines of a session and knows who has borrowed which; an actor itself.

    The engines end when it ends, and it ends with its driver, however that dies.

    Args:
        threads: CPU threads per engine.
        most: How many borrowers can be alive on one node and GPU at a time.
    """

    threads: int
    most: int
    _free: dict[tuple[str, str], list[Any]] = field(default_factory=dict)
    _lent: dict[str, Loan] = field(default_factory=dict)  # by borrower
    _started: int = 0

    def lend(self, borrower: str, node: str, gpus: str, call: str = "") -> Any:
        """Return an engine on `node` for these GPUs; to the same borrower there the same one.

        A borrower whose node was lost comes again from another, under the same name.

        Args:
            borrower: Its name.
            node: Where it is.
            gpus: What it holds.
            call: Names the `map_batches` call that it works for; several may run at a time.
        """
        place = node, gpus
        if borrower not in self._lent or self._lent[borrower].place[0] != node:
            stall = self._free.setdefault(place, [])
            engine = stall.pop() if stall else self._from_the_dead(place, call)
            self._lent[borrower] = Loan(place, engine or self._start(*place), call)
        return self._lent[borrower].engine

    def take_back(self, call: str = "") -> None:
        """Note that all borrowers of a call are gone; engines on GPUs free their memory."""
        for borrower, loan in list(self._lent.items()):
            if loan.call != call:
                continue
            del self._lent[borrower]
            self._free.setdefault(loan.place, []).append(loan.engine)
            if loan.place[1]:
                loan.engine.rest.remote()

    def warm(self, node: str, count: int) -> None:
        """Have `count` engines on `node`'s CPU ready before anybody asks."""
        stall = self._free.setdefault((node, ""), [])
        stall.extend(self._start(node, "") for _ in range(count - len(stall)))

    def rest(self) -> None:
        """Let idle engines drop their models, before something else needs the memory.

        Those of a lost node are forgotten: they would wait for it for ever.
        """
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        self._free = {place: stall for place, stall in self._free.items() if place[0] in alive}
        calls = [engine.rest.remote() for stall in self._free.values() for engine in stall]
        if calls:  # `ray.wait` takes no empty list
            ray.wait(calls, num_returns=len(calls), timeout=REST_SECONDS)

    def _from_the_dead(self, place: tuple[str, str], call: str) -> Any | None:
        """Return the engine of a borrower that must have died, as there is room for `most`."""
        here = {name: loan for name, loan in self._lent.items() if loan.place == place}
        if len(here) < self.most:
            return None
        own = [name for name, loan in here.items() if loan.call == call]
        return self._lent.pop((own or list(here))[0]).engine

    def _start(self, node: str, gpus: str) -> Any:
        remote = ray.remote(Engine).options(
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=TRIES_PER_BATCH - 1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
        number, self._started = self._started, self._started + 1
        return remote.remote(gpus, self.threads, number)


def drivers_node() -> NodeAffinitySchedulingStrategy:
    """Place an actor on the driver's node: when that is lost, the experiment is lost anyway."""
    here = ray.get_runtime_context().get_node_id()
    return NodeAffinitySchedulingStrategy(here, soft=False)


def dump_batch(batch: Batch) -> str:
    """Return a batch as JSON: rows are plain data, and nothing is unpickled from a store."""
    return json.dumps({"index": batch.index, "rows": batch.rows})


def load_batch(text: str) -> Batch:
    """Return the batch that `dump_batch` wrote."""
    return Batch(**json.loads(text))
