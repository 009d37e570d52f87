"""Training jobs on Ray Train: any number of workers, and one that is killed resumes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, cast

import ray
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.exceptions import TrainingFailedError
from upath import UPath

from qresafe.artifacts import disk_errors, is_local
from qresafe.dist.board import Board, Posted, shown
from qresafe.dist.engines import drivers_node
from qresafe.dist.metrics import send_to_ray
from qresafe.dist.settings import defaults
from qresafe.errors import ResourceError, UserError, located, place_of
from qresafe.failure import here, kind_of
from qresafe.metrics import place, record
from qresafe.process_log import end_log, log_path, logged
from qresafe.progress import Progress
from qresafe.specs import PatchSpec, ResourcesSpec
from qresafe.stages.runtime import TrainJob, cpu_threads
from qresafe.stages.train_engine import TrainEngine

RETRIES = 3  # restarts of the worker group after a worker was lost
# ... and after one could not start: on a host that is cut off, but not yet known to be. No more,
# for a group that waits in vain for its resources counts too, after `wait_seconds`.
START_RETRIES = 1


class RankedJob(Protocol):
    """A `TrainJob` that can also run as one rank of several."""

    spec: PatchSpec

    def run(self, engine: TrainEngine, folder: UPath, progress: Progress) -> None:
        """Train as one rank, continuing from what `folder` holds."""


def run(
    job: TrainJob,
    folder: UPath,
    progress: Progress,
    resources: ResourcesSpec,
    callbacks: Sequence[UserCallback] = (),
) -> None:
    """Run `job` on `resources.workers` Ray Train workers, in the Ray session of this process.

    A worker that dies has the whole group restarted, up to three times; it continues from the
    job's own last checkpoint in `folder`.

    Args:
        job: Picklable; each worker calls its `run`.
        folder: On storage that all workers share.
        progress: Advances as rank 0 does.
        resources: Number of workers and what each needs.
        callbacks: Hear of what the workers report to Ray Train.

    Raises:
        UserError: What the job raised.
        ResourceError: Workers were lost again and again.
    """
    folder = UPath(Path(str(folder)).absolute()) if is_local(folder) else folder
    board = ray.remote(Board).options(num_cpus=0, scheduling_strategy=drivers_node()).remote()
    config = {
        "job": job,
        "folder": folder,
        "board": board,
        "threads": max(1, int(resources.cpus_per_worker)),
    }
    try:
        with _settings(resources), shown(board, progress):
            _trainer(config, folder, resources, callbacks).fit()
    except TrainingFailedError as error:
        what = " ".join(str(error).split())[-300:]
        logs = log_path(folder, "*") or "the Ray logs of the workers"
        remedy = f"see {logs}; run again to continue from the last checkpoint"
        failure: UserError = ResourceError(f"training failed ({what})", remedy=remedy)
        vars(failure)["place"] = _place_of_first(error, folder)
        raise (_error(board) or failure) from error
    else:
        if raised := _error(board):
            raise raised
    finally:
        ray.kill(board)


def _worker(config: dict[str, Any]) -> None:
    """Run on every worker, in a process group that Ray Train made."""
    from qresafe.dist.train_engines import make_engine
    from qresafe.progress import Silent

    job, board = cast(RankedJob, config["job"]), config["board"]
    if ray.get(board.error.remote()) is not None:
        return  # this group was started again only to end
    engine = make_engine(get_device(), job.spec.zero_stage)
    send_to_ray()
    if engine.rank == 0 and ray.get(board.begin.remote()):
        record("qresafe_restarts", 1, place(config["folder"]))
    progress: Progress = Silent() if engine.rank else Posted(board)
    try:
        with (
            located(**here(rank=engine.rank)),
            logged(config["folder"], engine.rank),
            cpu_threads(config["threads"]),
            disk_errors(str(config["folder"])),
        ):
            job.run(engine, config["folder"], progress)
    except UserError as error:
        # No reason to try again: the driver raises it, and a lone worker ends as if well. Other
        # ranks may wait for this one in a collective; a failure has the whole group stopped.
        ray.get(board.fail.remote(error))
        if engine.world_size > 1:
            raise
    finally:
        end_log()  # Ray may end this process at once


def _trainer(
    config: dict[str, Any],
    folder: UPath,
    resources: ResourcesSpec,
    callbacks: Sequence[UserCallback],
) -> TorchTrainer:
    use_gpu = resources.gpus_per_worker > 0
    each = {"CPU": resources.cpus_per_worker}
    if use_gpu:
        each["GPU"] = resources.gpus_per_worker
    return TorchTrainer(
        _worker,
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=resources.workers, use_gpu=use_gpu, resources_per_worker=each
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=str(folder / "work"),
            failure_config=FailureConfig(
                max_failures=RETRIES, controller_failure_limit=START_RETRIES
            ),
            logging_config=LoggingConfig("ERROR"),
            callbacks=list(callbacks),
        ),
    )


def _settings(resources: ResourcesSpec) -> AbstractContextManager[None]:
    """Set what Ray Train reads from the driver's environment."""
    return defaults(
        {
            "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # fills the logs otherwise
            "RAY_CHDIR_TO_TRIAL_DIR": "0",  # workers keep the directory that paths are relative to
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # the end of training is seen at once
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(resources.wait_seconds),
            "RAY_TRAIN_METRICS_ENABLED": "0",
            # On one machine there is no other to move to, and a process less to start.
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": str(int(len(ray.nodes()) > 1)),
        }
    )


def _place_of_first(error: TrainingFailedError, folder: UPath) -> dict[str, Any]:
    """Return where training failed first: the lowest rank that is known to have raised."""
    failures = getattr(error, "worker_failures", {})
    for rank, failed in sorted(failures.items()):
        # A rank that was killed could not say where its log is.
        known = {"rank": rank, "kind": kind_of(failed), "log": str(log_path(folder, rank) or "")}
        return known | place_of(failed)
    return {}


def _error(board: Any) -> UserError | None:
    return cast("UserError | None", ray.get(board.error.remote()))
