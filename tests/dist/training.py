"""A training job on tiny inputs that Ray can pickle by name, and that can kill itself."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from patching import patch_inputs
from upath import UPath

from qresafe.progress import Progress
from qresafe.specs import PatchSpec
from qresafe.stages.patch_loop import train_patch
from qresafe.stages.train_engine import LocalEngine, TrainEngine


@dataclass(frozen=True)
class TinyJob:
    """Train the tiny Q0; once, rank `victim` is killed by SIGKILL before optimizer step `at`."""

    spec: PatchSpec
    mark: str = ""
    victim: int = 1
    at: int = 0

    def run(self, engine: TrainEngine, folder: UPath, progress: Progress) -> None:
        if self.mark and engine.rank == self.victim:
            _kill_before_step(engine, self.at, Path(self.mark))
        train_patch(engine, patch_inputs(self.spec), self.spec, folder, progress)

    def run_local(self, folder: UPath, progress: Progress) -> None:
        self.run(LocalEngine(), folder, progress)


def _kill_before_step(engine: TrainEngine, at: int, mark: Path) -> None:
    taken, real = iter(range(10**6)), engine.step

    def step(lr: float) -> float:
        if next(taken) == at and not mark.exists():
            mark.write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return real(lr)

    engine.step = step  # type: ignore[method-assign]
