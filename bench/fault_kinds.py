"""The faults themselves: whom they hit, what is done to it, and what a supervisor does after."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from bench.fault_head import Cluster, is_dead
from bench.fault_runs import Workload

Deed = Literal["kill", "pause", "freeze", "flip", "cut", "unplug", "isolate", "restart"]
PAUSE_SECONDS = (1.0, 8.0)  # how long a paused process is stopped
HEAD = {"raylet": ("raylet",), "head": ("gcs_server", "raylet")}
DAMAGED = ("*.parquet", "*.safetensors", "*.json", "*.jsonl", "DONE")


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        deed: "kill": SIGKILL; "pause": SIGSTOP, and SIGCONT some seconds later; "freeze":
            SIGSTOP, and SIGKILL some seconds later; "flip" and "cut": the driver is killed, and a
            file of its run gets one bit flipped, or loses its end. Of hosts (host_faults.py):
            "unplug": off the network for seconds; "isolate": until Ray has given it up, then back;
            "restart": killed, and started again at the same address.
        target: "driver", "raylet", "head", "host", "file", or one of the workload's targets.
    """

    deed: Deed
    target: str

    def __str__(self) -> str:
        told = {
            "kill": "{} killed (SIGKILL)",
            "pause": "{} stopped for seconds (SIGSTOP, SIGCONT)",
            "freeze": "{} stopped, then killed",
            "flip": "driver killed, and a bit of a {} flipped",
            "cut": "driver killed, and a {} cut off",
            "unplug": "{} cut off the network for seconds",
            "isolate": "{} cut off the network until Ray gave it up, and back",
            "restart": "{} killed and started again",
        }
        name = "head (GCS and raylet)" if self.target == "head" else self.target
        return told[self.deed].format(name)


def kinds_for(workload: Workload) -> list[Kind]:
    """Return the kinds of fault that a workload can meet."""
    own = [Kind(deed, name) for name in workload.targets for deed in ("kill", "pause", "freeze")]
    driver = [Kind("kill", "driver"), Kind("pause", "driver")]
    cluster = [Kind("kill", "raylet"), Kind("pause", "raylet"), Kind("kill", "head")]
    return [*own, *driver, *cluster, Kind("flip", "file"), Kind("cut", "file")]


class Fault:
    """One fault of a kind, in one run.

    Args:
        kind: Which.
        draw: Chooses the process, the file, the bit and the length of a pause.
        head: The cluster.
        workload: What runs.
    """

    def __init__(self, kind: Kind, draw: random.Random, head: Cluster, workload: Workload) -> None:
        self.kind, self._draw, self._head, self._workload = kind, draw, head, workload
        self.hit = ""  # what was hit; empty: nothing was there

    def moment(self, lasted: Mapping[str, float], baseline: float) -> float:
        """Return how many seconds after its victims have come up it happens.

        Args:
            lasted: For each target, how long before the fault-free end it came up.
            baseline: How long the fault-free run took.
        """
        return self._draw.uniform(0, lasted.get(self.kind.target, baseline))

    def victims(self, driver: int) -> list[psutil.Process]:
        """Return the processes that this kind of fault could hit now."""
        if self.kind.target in ("driver", "file"):
            return [psutil.Process(driver)] if psutil.pid_exists(driver) else []
        titles = HEAD.get(self.kind.target) or self._workload.targets[self.kind.target]
        return self._head.processes(*titles)

    def inject(self, driver: int, run: Path) -> None:
        """Do it."""
        found = self.victims(driver)
        if not found:
            return
        chosen = found if self.kind.target == "head" else [self._draw.choice(found)]
        with suppress(psutil.NoSuchProcess):  # it has just ended by itself
            self._do(chosen)
            self.hit = ", ".join(str(process.pid) for process in chosen)
        if self.kind.target == "file":
            # Not by psutil, which would take the exit code that the supervisor waits for.
            while not all(is_dead(process) for process in chosen):
                time.sleep(0.05)
            self.hit = self._damage(run)

    def _do(self, chosen: Sequence[psutil.Process]) -> None:
        if self.kind.deed not in ("pause", "freeze"):
            for process in chosen:
                process.kill()
            return
        for process in chosen:
            process.suspend()
        time.sleep(self._draw.uniform(*PAUSE_SECONDS))
        for process in chosen:
            if self.kind.deed == "freeze":
                process.kill()
            process.send_signal(signal.SIGCONT)

    def _damage(self, run: Path) -> str:
        files = sorted(p for pattern in DAMAGED for p in run.rglob(pattern) if p.stat().st_size)
        file = self._draw.choice(files)
        damage(file, self.kind.deed, self._draw)
        return str(file.relative_to(run))


def damage(file: Path, deed: str, draw: random.Random) -> None:
    """Flip one bit of a file, or cut off its end; what it weighs and when it was written change."""
    data = bytearray(file.read_bytes())
    if deed == "flip":
        place = draw.randrange(len(data))
        data[place] ^= 1 << draw.randrange(8)
    else:
        del data[draw.randrange(len(data)) :]
    file.write_bytes(bytes(data))
