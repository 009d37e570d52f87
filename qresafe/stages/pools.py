"""Two models that answer at the same time, each on a pool of workers of its own.

Each has a thread of the driver, which plans, waits and puts together; the work is done by the
workers. Stages share nothing but the storage, and each writes into a folder of its own, so results
are those of one after the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import pyarrow as pa

from qresafe.artifacts import Artifact, Run
from qresafe.driving import forewarn
from qresafe.hf.warm import ModelInput
from qresafe.progress import Progress
from qresafe.specs import GenerateSpec
from qresafe.stages.generate import generate
from qresafe.stages.runtime import Runtime

Task = Callable[[Runtime, Progress], Artifact]


@dataclass(frozen=True)
class Question:
    """What one model is to answer; see `generate`."""

    label: str
    model: ModelInput | None
    prompts: pa.Table
    spec: GenerateSpec

    def ask(self, run: Run, runtime: Runtime, progress: Progress) -> Artifact:
        """Return the answers."""
        return generate(
            run,
            label=self.label,
            model=self.model,
            prompts=self.prompts,
            spec=self.spec,
            runtime=runtime,
            progress=progress,
        )


def ask_at_once(
    run: Run, questions: Sequence[Question], pools: Sequence[Runtime], progress: Progress
) -> list[Artifact]:
    """Return the answers to each question, from the pool at its place."""
    return at_once([partial(question.ask, run) for question in questions], pools, progress)


def at_once(tasks: Sequence[Task], pools: Sequence[Runtime], progress: Progress) -> list[Artifact]:
    """Run every task in its pool, all at the same time, and return what they made, in order.

    When one fails, the others stop after the batch that they are at, and its error is raised;
    what was finished is kept. An interrupt (Ctrl-C, SIGTERM) is raised at once.

    Args:
        tasks: Must not need each other.
        pools: As many.
        progress: Shows them beside each other.
    """
    failures: list[BaseException] = []
    stop = threading.Event()
    lanes = [_Lane(progress.beside(), stop) for _ in tasks]
    turns = [_Turn(*each, failures) for each in zip(tasks, pools, lanes, strict=True)]
    for turn in turns:
        turn.start()
    try:
        for turn in turns:
            turn.join()
    except BaseException as interrupt:
        stop.set()
        forewarn(interrupt)  # Ray may abort this process soon
        raise
    if failures:
        raise failures[0]
    return [made for turn in turns for made in turn.made]


class _Turn(threading.Thread):
    """Runs one task; leaves what it made, or the error."""

    def __init__(
        self, task: Task, pool: Runtime, lane: _Lane, failures: list[BaseException]
    ) -> None:
        super().__init__(daemon=True)  # an interrupt does not wait for it
        self.made: list[Artifact] = []
        self._task, self._pool, self._lane, self._failures = task, pool, lane, failures

    def run(self) -> None:
        try:
            self.made.append(self._task(self._pool, self._lane))
        except _Stopped:
            self._lane.leave()
        except BaseException as error:  # the driver raises it
            self._failures.append(error)
            self._lane.stop.set()


class _Stopped(Exception):
    """Another task has failed."""


class _Lane:
    """A `Progress` that ends its task once `stop` is set."""

    def __init__(self, shown: Progress, stop: threading.Event) -> None:
        self.stop, self._shown, self._open = stop, shown, 0

    def start(self, stage: str, total: int | None = None, unit: str = "") -> None:
        self._check()
        self._open += 1
        self._shown.start(stage, total, unit)

    def advance(self, done: int = 1, note: str = "") -> None:
        self._shown.advance(done, note)
        self._check()

    def finish(self, note: str = "", reused: bool = False) -> None:
        self._open -= 1
        self._shown.finish(note, reused)

    def beside(self) -> Progress:
        return _Lane(self._shown.beside(), self.stop)

    def leave(self) -> None:
        """Close what is open, so that only what failed stands there as such."""
        while self._open:
            self.finish("stopped")

    def _check(self) -> None:
        if self.stop.is_set():
            raise _Stopped
