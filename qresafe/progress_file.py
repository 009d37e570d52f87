"""`progress.json`: how far a run's open stages are, for other terminals and other hosts.

A thread writes it every few seconds, so that a slow storage holds nobody up. It is removed when
its driver ends, well or not; where one lies without a driver, that driver was killed.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from upath import UPath

from qresafe import metrics
from qresafe.artifacts import is_local, write_text
from qresafe.leftovers import sweep
from qresafe.progress import Part, Stack

FILE = "progress.json"
LOCAL_SECONDS, REMOTE_SECONDS = 2.0, 10.0  # between two writes


class StageProgress(BaseModel):
    """How far one open stage, or part of one, is; times are seconds since 1970.

    Attributes:
        stage: Its name.
        done: Units of work that are finished.
        total: All units, None if not known.
        unit: What is counted.
        rate: Units per second of late; None before there is one.
        seconds_left: The rest at this rate; None: not known.
        note: A live figure of the stage's own ("312 tok/s", "loss 0.41").
        began: When it began.
        moved: When it last got further.
    """

    model_config = ConfigDict(frozen=True)

    stage: str
    done: int
    total: int | None
    unit: str
    rate: float | None
    seconds_left: float | None
    note: str
    began: float
    moved: float

    @classmethod
    def of(cls, part: Part) -> StageProgress:
        """Return the state of `part` now."""
        since = time.time() - time.monotonic()  # from this process's clock to everybody's
        rate, left = part.rate(), part.seconds_left()
        return cls(
            stage=part.name.strip(),
            done=part.done,
            total=part.total,
            unit=part.unit,
            rate=round(rate, 3) if rate is not None else None,
            seconds_left=round(left, 1) if left is not None else None,
            note=part.note,
            began=round(since + part.began, 3),
            moved=round(since + part.moved, 3),
        )


class RunProgress(BaseModel):
    """Who drives a run, and its open stages, the innermost last."""

    model_config = ConfigDict(frozen=True)

    host: str
    process: int
    updated: float
    stages: list[StageProgress]


class ProgressFile(Stack):
    """A `Progress` that keeps `progress.json` in a run's folder, between `with` and its end.

    Args:
        root: The run's folder, held by this process.
        seconds: Between two writes; default: by the kind of storage.
    """

    def __init__(self, root: UPath, seconds: float | None = None) -> None:
        super().__init__()
        self._path = root / FILE
        self._seconds = seconds or (LOCAL_SECONDS if is_local(root) else REMOTE_SECONDS)
        self._ended_all = threading.Event()
        self._writer = threading.Thread(target=self._keep, name="progress.json", daemon=True)

    def __enter__(self) -> ProgressFile:
        if is_local(self._path):  # what a killed driver was writing here
            sweep(Path(str(self._path.parent)), below=False)
        self._writer.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Write no more, and remove the file."""
        self._ended_all.set()
        self._writer.join()
        with suppress(Exception):
            self._path.unlink(missing_ok=True)

    def stage(self) -> str:
        """Return the names of the open stage and its open parts, empty between two."""
        return self.path()

    def now(self) -> RunProgress:
        """Return the state of the run."""
        stages = [StageProgress.of(part) for part in self.parts()]
        host, process = socket.gethostname(), os.getpid()
        return RunProgress(host=host, process=process, updated=round(time.time(), 3), stages=stages)

    def _keep(self) -> None:
        while True:
            now = self.now()
            with suppress(Exception):  # it is only a display; the next time will do
                for stage in now.stages:
                    self._record(stage)
                write_text(self._path, now.model_dump_json())
            if self._ended_all.wait(self._seconds):
                return

    def _record(self, stage: StageProgress) -> None:
        labels = {"run": self._path.parent.name, "stage": stage.stage}
        metrics.record("qresafe_stage_done", stage.done, labels)
        if stage.total is not None:
            metrics.record("qresafe_stage_total", stage.total, labels)


def read_progress(root: UPath) -> RunProgress | None:
    """Return how far a run was when its driver last said so, None if there is nothing to say."""
    try:
        return RunProgress.model_validate_json((root / FILE).read_text())
    except (OSError, ValueError):
        return None
