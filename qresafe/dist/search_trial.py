"""What one Tune trial runs: a patch in its own process, or on Ray Train workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ray
import ray.train
import ray.tune
from ray.tune.integration.ray_train import TuneReportCallback
from upath import UPath

from qresafe.dist import train
from qresafe.dist.runtime import RayRuntime, make_runtime, threads_per_worker
from qresafe.progress import Progress
from qresafe.search_spec import Search
from qresafe.specs import ResourcesSpec
from qresafe.stages.runtime import InProcessRuntime, Runtime, TrainJob, cpu_threads
from qresafe.stages.search.trial import TrialJob

OUTCOME = "outcome"  # the key of a trial's last report: its row, as JSON

Trainable = Callable[[dict[str, Any]], None]


def make_trainable(search: Search) -> Trainable:
    """Return the function that Tune calls with {"trial": index, "params": ..., "start": key}."""
    resources = search.validation.resources
    tell = tell_train if resources.workers else tell_tune

    def trainable(config: dict[str, Any]) -> None:
        params = config["params"]
        spec, probe = search.trial(params), search.spec.probe
        job = TrialJob(config["trial"], params, spec, probe, config["start"])
        runtime = trial_runtime(resources)
        try:
            with cpu_threads(threads_per_worker(resources)):
                row = job.run(runtime, tell)
        finally:
            runtime.close()
        ray.tune.report({OUTCOME: row.model_dump_json()} | row.metrics)

    return trainable


def demand(search: Search) -> dict[str, float]:
    """Return what a trial's own process holds; Train workers hold their part themselves."""
    resources = search.validation.resources
    if resources.workers:
        return {"memory": 1.0}  # something must be asked for: one byte
    held = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        held["GPU"] = resources.gpus_per_worker
    return held


def tell_tune(probed: Mapping[str, Any]) -> None:
    """Report a probe from the trial's own process."""
    ray.tune.report(_known(probed))


def tell_train(probed: Mapping[str, Any]) -> None:
    """Report a probe from every Train worker; `TuneReportCallback` hands it on."""
    ray.train.report(_known(probed))


def _known(probed: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in probed.items() if value is not None}


def trial_runtime(resources: ResourcesSpec) -> Runtime:
    """Return what a trial's stages run on.

    Without GPUs a trial answers in its own process, on the CPUs that its training has left.
    """
    if not resources.workers:
        return make_runtime(resources)
    if resources.gpus_per_worker:
        return GpuTrialRuntime(resources)
    return CpuTrialRuntime(resources)


class CpuTrialRuntime(InProcessRuntime):
    """Trains on Ray Train workers, and does the rest in this process."""

    def __init__(self, resources: ResourcesSpec) -> None:
        super().__init__(threads=threads_per_worker(resources))
        self._resources = resources

    def train(self, job: TrainJob, folder: UPath, progress: Progress) -> None:
        train.run(job, folder, progress, self._resources.training, [TuneReportCallback()])


class GpuTrialRuntime(RayRuntime):
    """A cluster's runtime; what Train workers report goes to Tune."""

    def train(self, job: TrainJob, folder: UPath, progress: Progress) -> None:
        self.wait_for(self._resources.workers)
        ray.get(self._stable.rest.remote())
        train.run(job, folder, progress, self._resources.training, [TuneReportCallback()])
