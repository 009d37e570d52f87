"""Batches on Ray Data: one row per planned batch, an actor pool that leases warm engines."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.exceptions import RayActorError
from upath import UPath

from qresafe import errors
from qresafe.dist.engines import TRIES_PER_BATCH, dump_batch, load_batch
from qresafe.failure import LOST, OUT_OF_MEMORY, is_out_of_memory, kind_of
from qresafe.process_log import log_path
from qresafe.specs import ResourcesSpec
from qresafe.stages.runtime import Batch, BatchJob, Made, record_ids

# From so many batches per actor on, each holds one in reserve: with 12 real actors and 8 batches
# each, two in flight were busy 91 % of the time and one 87.5 %.
RESERVE_FROM = 8


class Lease:
    """One actor of Ray Data's pool: holds the CPU or GPU, and sends its batches to an engine.

    Args:
        stable: The session's `Stable`.
        call: Names this `map_batches` call.
        job: What to compute.
        parts: Where parts go.
    """

    def __init__(self, stable: Any, call: str, job: BatchJob, parts: UPath) -> None:
        context = ray.get_runtime_context()
        gpus = ",".join(str(gpu) for gpu in ray.get_gpu_ids())
        borrowed = stable.lend.remote(context.get_actor_id(), context.get_node_id(), gpus, call)
        self._engine = ray.get(borrowed)
        self._call, self._job, self._parts = call, job, parts

    def __call__(self, block: pa.Table) -> pa.Table:
        batches = block["batch"].to_pylist()
        return pa.table({"result": [json.dumps(self._compute(batch)) for batch in batches]})

    def _compute(self, batch: str) -> dict[str, Any]:
        # Errors travel as data: Ray Data's wrapping would lose their sentence and their cause.
        sent = self._engine.compute.remote(self._call, self._job, batch, self._parts)
        try:
            return {"made": ray.get(sent)}
        except RayActorError as error:
            return {"failure": _dump_error(_died(error, load_batch(batch), self._parts))}
        except Exception as error:
            return {"failure": _dump_error(error)}


def compute(
    job: BatchJob,
    batches: Sequence[Batch],
    parts: UPath,
    *,
    stable: Any,
    resources: ResourcesSpec,
) -> Iterator[Made]:
    """Compute batches on the cluster and yield each as it is done.

    The pool grows to `resources.workers` actors, as far as there are batches and free resources.
    An actor or engine that dies is started again, and its batch is computed again.

    Args:
        job: What to compute.
        batches: The batches to compute; at least one.
        parts: Where parts go; must be reachable from every worker.
        stable: The session's `Stable` actor.
        resources: Workers, and what each of them holds.

    Raises:
        UserError: What the job raised, if it is one.
        WorkerError: What else it raised.
        ResourceError: Workers keep dying.
    """
    _quiet()
    most, call = min(resources.workers, len(batches)), uuid.uuid4().hex
    items = [{"batch": dump_batch(batch)} for batch in batches]
    # One block per batch: Ray Data hands out, retries and reports whole blocks.
    made = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        Lease,
        fn_constructor_args=(stable, call, job, parts),
        batch_size=None,
        batch_format="pyarrow",
        # Sized by the plan at once: the autoscaler's own growth, by queue length, comes late.
        compute=ray.data.ActorPoolStrategy(
            min_size=1,
            max_size=most,
            initial_size=most,
            max_tasks_in_flight_per_actor=in_flight(len(batches), most),
        ),
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker or None,
    )
    try:
        for row in made.iter_rows():
            result = json.loads(row["result"])
            if "failure" in result:
                raise _load_error(result["failure"])
            yield Made(**result["made"])
    finally:
        ray.get(stable.take_back.remote(call))


def in_flight(batches: int, actors: int) -> int:
    """Return how many batches an actor holds at a time, the one that it computes included.

    One in reserve hides the driver's reply. But it waits for its own actor while others have
    nothing left, or have just started: with few batches each, that costs more
    (docs/reliability/schedule.md).
    """
    return 2 if batches >= RESERVE_FROM * actors else 1


def _died(error: RayActorError, batch: Batch, parts: UPath) -> errors.ResourceError:
    """Return what to say of a batch that has lost its worker too often."""
    what = f"a worker died {TRIES_PER_BATCH} times on the same batch"
    remedy = "most often memory runs out: lower the batch size"
    logs = str(log_path(parts, "*") or "")
    told = errors.ResourceError(what, remedy=f"{remedy}; see {logs}" if logs else remedy)
    kind = OUT_OF_MEMORY if is_out_of_memory(error) else LOST
    vars(told)["place"] = {"kind": kind, "records": record_ids(batch.rows), "log": logs}
    return told


class WorkerError(Exception):
    """What a worker raised that is no mistake of the user's; its text is the worker's traceback."""


def _dump_error(error: Exception) -> dict[str, Any]:
    place = {"kind": kind_of(error)} | errors.place_of(error)
    cause = next(errors.causes(error))  # inside Ray's own wrapper
    if not isinstance(cause, errors.UserError):
        return {"traceback": str(error), "place": place}
    told = {"what": cause.what, "where": cause.where, "remedy": cause.remedy}
    return {"class": type(cause).__name__, "told": told, "place": place}


def _load_error(fields: dict[str, Any]) -> Exception:
    if "traceback" in fields:
        error: Exception = WorkerError(fields["traceback"])
    else:
        kind, told = getattr(errors, fields["class"], errors.UserError), fields["told"]
        error = kind(told.pop("what"), **told)
    vars(error)["place"] = fields["place"]
    return error


def _quiet() -> None:
    """Leave the screen to our own progress display; Ray Data's logs are in its session folder."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
