"""A search on Ray Tune: shared stages once, trials side by side, and a row for each of them.

A search is continued from its rows and its stages' folders, not from Tune's own snapshots: those
are pickles, they come in intervals, and they say nothing about a half-trained patch.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import ray
from ray import tune
from ray.tune import FailureConfig, RunConfig, TuneConfig, Tuner
from upath import UPath

from qresafe.artifacts import is_local, write_text
from qresafe.dist import runtime as runtimes
from qresafe.dist.lost import loss_told
from qresafe.dist.search_trial import demand, make_trainable
from qresafe.dist.search_tune import Live, QueueSearcher, Recorder, RuleScheduler
from qresafe.dist.settings import defaults
from qresafe.dist.trackers import tracker_callbacks
from qresafe.driving import driving
from qresafe.errors import UserError
from qresafe.hf.warm import shelf
from qresafe.progress import Progress, Silent
from qresafe.search_spec import Search
from qresafe.specs import ExperimentSpec
from qresafe.stages.experiment import Experiment
from qresafe.stages.patch import needs_reference
from qresafe.stages.runtime import Runtime
from qresafe.stages.search.confirm import confirm, write_confirmation
from qresafe.stages.search.folder import (
    CONFIRMATION,
    SESSIONS,
    STOPPED,
    search_folder,
    write_results,
)
from qresafe.stages.search.ledger import Ledger, Row
from qresafe.stages.search.queue import TrialQueue
from qresafe.stages.search.report import write_report
from qresafe.stages.search.trial import share_stages
from qresafe.stages.search.values import upper_key

RETRIES = 2  # of a trial whose process or node was lost; it goes on from its own checkpoint


@contextmanager
def session(search: Search, progress: Progress) -> Iterator[Runtime]:
    """Give the runtime of the stages that trials share, with a Ray session for the trials."""
    progress.start("start Ray")
    opened = not ray.is_initialized()
    if opened:
        runtimes.connect(search.validation.resources.address)
    try:
        with closing(runtimes.make_runtime(search.validation.resources)) as runtime:
            progress.finish()
            yield runtime
    finally:
        if opened:
            ray.shutdown()


@loss_told()
def run_search(search: Search, progress: Progress) -> UPath:
    """Run a search to its end, or continue it; return its folder (see `stages.search.folder`).

    Args:
        search: The search, checked by `check_search`.
        progress: Shows shared stages, trials and the confirmation.

    Raises:
        ResourceError: A trial needs more than the cluster has, or another process is at it.
        UserError: Three trials failed for the same reason; the table of the others is written.
    """
    folder = search_folder(search)
    root = folder.parent.parent
    with driving(root, progress) as progress, session(search, progress) as runtime:
        with closing(Sharing(search, runtime, progress)) as sharing:
            queue = run_trials(search, sharing, progress)
        rows = queue.ordered()
        best = write_results(search, rows)
        reason = queue.stop_reason()
        # An earlier session's is of another winner, or is made again.
        (folder / CONFIRMATION).unlink(missing_ok=True)
        if reason is None and best is not None and search.spec.confirm:
            found = confirm(search, best.params, runtime, progress)
            write_confirmation(folder / CONFIRMATION, found)
        write_report(search, rows)
        if reason is not None:
            write_text(folder / STOPPED, reason)
            remedy = "mend the cause or narrow the space, and run again: finished trials are kept"
            raise UserError(f"the search was stopped: {reason}", remedy=remedy)
    return folder


def run_trials(search: Search, sharing: Sharing, progress: Progress) -> TrialQueue:
    """Run all trials that have not ended yet; their rows lie in the search's folder."""
    folder = search_folder(search)
    queue = TrialQueue(search, Ledger(folder), sharing.ready)
    queue.forget_failures(accidents_only=not (folder / STOPPED).exists())
    (folder / STOPPED).unlink(missing_ok=True)
    if queue.finished():
        queue.next()  # takes in all rows
        progress.start("search", queue.total, "trials")
        progress.finish(f"{len(queue.rows)} trials", reused=True)
        return queue
    slots = places(search)
    sharing.begin()
    _tune(search, queue, slots, folder, progress)
    return queue


def places(search: Search) -> int:
    """Return how many trials can run at a time, having waited for room for one.

    Raises:
        ResourceError: The cluster has no room for one trial, and does not get it in time.
    """
    resources = search.validation.resources
    each = max(1, resources.workers)
    patient = not runtimes.is_local_address(resources.address)
    runtimes.wait_for(resources, each, patient=patient)
    return max(1, min(search.spec.budget.concurrent, runtimes.count_places(resources) // each))


class Sharing:
    """Makes the stages above the patch once for each setting of them, in the driver.

    The base's are made at once; others in a thread, so that running trials are not held up.
    """

    def __init__(self, search: Search, runtime: Runtime, progress: Progress) -> None:
        self._base, self._runtime, self._progress = search.validation, runtime, progress
        self._thread = ThreadPoolExecutor(1)
        self._made: dict[tuple[str, bool], Future[None]] = {}

    def begin(self) -> None:
        """Make the base's stages."""
        share_stages(Experiment(self._base, self._runtime, self._progress))
        shelf().clear()  # trials may need the memory
        done: Future[None] = Future()
        done.set_result(None)
        self._made[self._key(self._base)] = done

    def close(self) -> None:
        """Begin nothing new, and wait for what is being made."""
        self._thread.shutdown(cancel_futures=True)

    def ready(self, spec: ExperimentSpec) -> bool:
        """Return whether a trial's shared stages are there; begin to make them if not.

        A failure counts as ready: the trial meets it again, and becomes a row.
        """
        key = self._key(spec)
        if key not in self._made:
            experiment = Experiment(spec, self._runtime, Silent())
            self._made[key] = self._thread.submit(share_stages, experiment)
        return self._made[key].done()

    def _key(self, spec: ExperimentSpec) -> tuple[str, bool]:
        return upper_key(spec), needs_reference(spec.patch)


def _tune(search: Search, queue: TrialQueue, slots: int, folder: UPath, progress: Progress) -> None:
    live = Live(queue)
    progress.start("search", queue.total, "trials")
    with tempfile.TemporaryDirectory(prefix="qresafe-tune-") as scratch, defaults(_SETTINGS):
        recorder = Recorder(live, progress)
        storage = _tune_storage(search, folder, scratch)
        tuner = Tuner(
            tune.with_resources(make_trainable(search), demand(search)),
            tune_config=TuneConfig(
                search_alg=QueueSearcher(live),
                scheduler=RuleScheduler(live),
                num_samples=-1,
                max_concurrent_trials=slots,
                # Warm processes: imports take longer than a small trial's evaluation. A thread
                # that waits for Train workers cannot be reused.
                reuse_actors=not search.validation.resources.workers,
            ),
            run_config=RunConfig(
                name=search.spec.name,
                storage_path=storage,
                failure_config=FailureConfig(max_failures=RETRIES),
                callbacks=[recorder, *tracker_callbacks(search, folder)],
                verbose=0,
            ),
        )
        known = set(queue.rows)
        began = time.perf_counter()
        with _quiet():
            tuner.fit()
        seconds = time.perf_counter() - began
    note_session(folder, slots, seconds, [r for i, r in queue.rows.items() if i not in known])
    done = len(queue.rows)
    progress.finish(f"{done} of {queue.total} trials have ended")


def note_session(folder: UPath, slots: int, seconds: float, rows: Sequence[Row]) -> None:
    """Add a line to sessions.jsonl: what Tune took in all, and what the trials took themselves."""
    ran = [row for row in rows if row.same_as is None]
    spent = {"slots": slots, "seconds": round(seconds, 3), "trials": len(ran)}
    spent["trial_seconds"] = round(sum(row.seconds for row in ran), 3)
    path = folder / SESSIONS
    before = path.read_text() if path.exists() else ""
    write_text(path, before + json.dumps(spent) + "\n")


_SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the newer display prints on stdout at any verbosity
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # those that were asked for are named
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the search as it ends any command
    "TUNE_GLOBAL_CHECKPOINT_S": "100000",  # its snapshots are not used
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def _tune_storage(search: Search, folder: UPath, scratch: str) -> str:
    """Return where Tune keeps its own files: for TensorBoard beside the rows, else nowhere."""
    if "tensorboard" in search.spec.trackers and is_local(folder):
        return str(Path(str(folder)).absolute() / "tensorboard")
    return scratch


@contextmanager
def _quiet() -> Iterator[None]:
    names = ("ray.tune", "ray.train", "ray.air")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
