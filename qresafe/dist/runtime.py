"""The runtime of a cluster: one Ray session and warm engines for all stages of an experiment."""

from __future__ import annotations

import copy
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from upath import UPath

from qresafe.artifacts import is_local
from qresafe.dist import autoscaler, data, vllm
from qresafe.dist.engines import Stable, drivers_node
from qresafe.dist.lost import loss_told, watch_head
from qresafe.dist.metrics import send_to_ray
from qresafe.errors import ResourceError
from qresafe.hf.spread import gpus
from qresafe.metrics import send_to
from qresafe.progress import Progress
from qresafe.specs import ResourcesSpec
from qresafe.stages.engines import VllmJob
from qresafe.stages.runtime import (
    Batch,
    BatchJob,
    InProcessRuntime,
    Made,
    Runtime,
    Spent,
    Tally,
    TrainJob,
)
from qresafe.stages.served import check_vllm

POOL_SECONDS = 30.0  # for a pool to notice that its engines are gone


def make_runtime(resources: ResourcesSpec, ready: Callable[[], None] | None = None) -> Runtime:
    """Return what runs an experiment's stages: this process at `workers: 0`, else Ray.

    Args:
        resources: Cluster address, number of workers, and what each of them needs.
        ready: See `RayRuntime`; this process is never waited for.

    Raises:
        ResourceError: The Ray cluster cannot be reached, or there is no GPU in this process.
    """
    if resources.workers:
        return RayRuntime(resources, ready)
    count = math.ceil(resources.gpus_per_worker)
    if count > torch.cuda.device_count():
        what = f"resources.gpus_per_worker is {resources.gpus_per_worker:g}, but torch sees "
        what += f"{torch.cuda.device_count() or 'no'} GPU here"
        raise ResourceError(what, remedy="lower it, or run where torch sees as many")
    return InProcessRuntime(gpus(count), threads_per_worker(resources))


def threads_per_worker(resources: ResourcesSpec) -> int:
    """Return the CPU threads of a worker's torch."""
    return max(1, int(resources.cpus_per_worker))


def _sharers(resources: ResourcesSpec) -> int:
    """Return how many workers can be on the same device: many on a CPU, few on a GPU."""
    each = resources.gpus_per_worker
    return max(1, int(1 / each)) if each else resources.workers


class RayRuntime:
    """Runs stages on Ray: batches on Ray Data, training on Ray Train.

    Joins a session that this process already has, or opens one that lasts until `close`.

    Args:
        resources: Cluster address, number of workers, and what each of them needs.
        ready: Called once, when nodes that were waited for are there and before any work on
            them: an autoscaled cluster has none to look at before. It may raise.

    Raises:
        ResourceError: The cluster cannot be reached.
    """

    def __init__(self, resources: ResourcesSpec, ready: Callable[[], None] | None = None) -> None:
        self._ready, self._room = [ready] if ready else [], threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._resources, began = resources, time.perf_counter()
        self.workers = resources.workers
        self._opened = not ray.is_initialized()
        if self._opened:
            connect(resources.address)
        self.startup_seconds = round(time.perf_counter() - began, 3)
        send_to_ray()
        here = ray.get_runtime_context().get_node_id()
        stable = ray.remote(Stable).options(num_cpus=0, scheduling_strategy=drivers_node())
        self._stable: Any = stable.remote(threads_per_worker(resources), _sharers(resources))
        if not resources.gpus_per_worker:  # imports overlap with what the driver does next
            self._stable.warm.remote(here, min(resources.workers, os.cpu_count() or 1))

    def check(self) -> None:
        self.wait_for(self._resources.workers)

    @loss_told()
    def map_batches(
        self, job: BatchJob, batches: Sequence[Batch], parts: UPath, progress: Progress
    ) -> Spent:
        tally = Tally(progress)
        parts = UPath(Path(str(parts)).absolute()) if is_local(parts) else parts
        todo = tally.skip_finished(batches, parts)
        with self._busy():
            if todo:
                for made in self._compute(job, todo, parts):
                    tally.add(made)
        return tally.spent()

    @contextmanager
    def _busy(self) -> Iterator[None]:
        """Note that this thread waits for workers."""
        here = threading.current_thread()
        self._threads.add(here)
        try:
            yield
        finally:
            self._threads.discard(here)

    def _compute(self, job: BatchJob, todo: list[Batch], parts: UPath) -> Iterator[Made]:
        if isinstance(job, VllmJob):
            check_vllm(self._resources)
            self.wait_for(1)
            return vllm.compute(job, todo, parts, resources=self._resources)
        self.wait_for(1)
        return data.compute(job, todo, parts, stable=self._stable, resources=self._resources)

    @loss_told()
    def train(self, job: TrainJob, folder: UPath, progress: Progress) -> None:
        from qresafe.dist import train

        self.wait_for(self._resources.workers)
        ray.get(self._stable.rest.remote())  # training may need all memory
        train.run(job, folder, progress, self._resources.training)

    def wait_for(self, workers: int) -> None:
        """Wait until the cluster is large enough for `workers` workers at a time.

        Raises:
            ResourceError: It is not after `wait_seconds`; a local cluster does not grow, so
                nothing is waited for there.
        """
        with self._room:  # pools ask at the same time
            wait_for(self._resources, workers, patient=not self._opened_locally())
            if self._ready:
                self._ready.pop()()

    def pools(self) -> tuple[Runtime, Runtime] | None:
        teachers = self._resources.teacher_workers
        return (self._pool(teachers), self._pool(self.workers - teachers)) if teachers else None

    def _pool(self, workers: int) -> Runtime:
        """Return this runtime with fewer workers: on the same session, with the same engines."""
        pool = copy.copy(self)
        pool.workers = workers
        only = {"workers": workers, "teacher_workers": 0}
        pool._resources = self._resources.model_copy(update=only)
        return pool

    def close(self) -> None:
        """End the engines, and the Ray session if this runtime opened it."""
        ray.kill(self._stable)
        # After an interrupt pools may be waiting; without engines they fail, and Ray aborts a
        # process that leaves while they do not.
        for thread in self._threads - {threading.current_thread()}:
            thread.join(POOL_SECONDS)
        if self._opened:
            send_to(None)
            ray.shutdown()

    def _opened_locally(self) -> bool:
        return self._opened and is_local_address(self._resources.address)


def is_local_address(address: str | None) -> bool:
    """Return whether `connect` would start a local cluster, which does not grow."""
    return not (address or os.environ.get("RAY_ADDRESS"))


def wait_for(wanted: ResourcesSpec, workers: int, *, patient: bool) -> None:
    """Wait until the cluster is large enough for `workers` workers at a time.

    Args:
        wanted: What each worker needs, and how long to wait.
        workers: How many.
        patient: False does not wait at all.

    Raises:
        ResourceError: It is not large enough after `wait_seconds`, or its autoscaler starts
            nothing for the demand.
    """
    if (places := count_places(wanted)) >= workers:
        return
    if not patient:
        raise _too_small(wanted, workers, places)
    moved = began = time.monotonic()
    bundle = _bundle(wanted)
    with autoscaler.demanded(bundle, workers) as ask_again:
        while (places := count_places(wanted)) < workers:
            ask_again()
            now = time.monotonic()
            moved = moved if autoscaler.is_idle(bundle, workers) else now
            refused = now - moved >= autoscaler.PATIENCE_SECONDS
            if refused or now - began >= wanted.wait_seconds:
                raise _too_small(wanted, workers, places, refused=refused)
            time.sleep(1)


def connect(address: str | None) -> None:
    """Join the cluster at `address` (or RAY_ADDRESS), or start a local one, without chatter.

    Raises:
        ResourceError: Nothing answers there, or it asks for another token.
    """
    # Ray gives its workers the lowest priority but four, yet here they do all the work: anything
    # else that runs on the machine would starve them.
    os.environ.setdefault("RAY_worker_niceness", "0")
    target = address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"include_dashboard": False} if target == "local" else {}
    try:
        with _hushed():
            ray.init(target, log_to_driver=False, logging_level=logging.ERROR, **options)
    except Exception as error:  # a node that is not up in time raises the bare class
        raise _not_joined(target, error) from error
    watch_head()


def _not_joined(target: str, error: Exception) -> ResourceError:
    """Say why a cluster cannot be joined: Ray names a wrong token in an inner error alone."""
    inner: BaseException | None = error
    while inner is not None:
        if "InvalidAuthToken" in str(inner):
            what = "the Ray cluster asks for another token (`ray start` switches tokens on)"
            remedy = "export RAY_AUTH_MODE=token, with its token in ~/.ray/auth_token"
            return ResourceError(what, where=target, remedy=remedy)
        inner = inner.__cause__
    what = f"cannot join the Ray cluster ({' '.join(str(error).split())[:200]})"
    remedy = "start it (ray start --head) or leave resources.address empty for a local one"
    return ResourceError(what, where=target, remedy=remedy)


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep Ray's core from printing to the terminal, past Python's own stderr.

    The pool actors of Ray Data make it print a harmless warning as an error at every stage, and
    the variable that turns it off is itself announced. A level that the user set stays.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    terminal = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)


def _bundle(wanted: ResourcesSpec) -> dict[str, float]:
    """Return what a worker holds, in Ray's names."""
    each = {"CPU": wanted.cpus_per_worker, "GPU": wanted.gpus_per_worker}
    return {name: amount for name, amount in each.items() if amount}


def count_places(wanted: ResourcesSpec) -> int:
    """Return how many workers the cluster's living nodes have room for, were they idle."""
    places = 0
    for node in ray.nodes():
        if node["Alive"]:
            supply = node["Resources"]
            room = supply.get("CPU", 0.0) // wanted.cpus_per_worker
            if wanted.gpus_per_worker:
                room = min(room, supply.get("GPU", 0.0) // wanted.gpus_per_worker)
            places += int(room)
    return places


def _too_small(
    wanted: ResourcesSpec, workers: int, places: int, *, refused: bool = False
) -> ResourceError:
    supply = ray.cluster_resources()
    each = f"{wanted.cpus_per_worker:g} CPUs and {wanted.gpus_per_worker:g} GPUs"
    what = (
        f"{workers} workers with {each} each are wanted, but the cluster has "
        f"{supply.get('CPU', 0):g} CPUs and {supply.get('GPU', 0):g} GPUs in all, "
        f"room for {places}"
    )
    remedy = "lower resources.workers or what each of them needs, or add nodes"
    if refused:
        what += ", and its autoscaler starts no node for them"
        remedy += " (max_workers and available_node_types in the cluster's configuration)"
    return ResourceError(what, where="the Ray cluster", remedy=remedy)
