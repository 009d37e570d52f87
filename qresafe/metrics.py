"""Figures of a running job for Prometheus: their names, and where they are handed to.

Whoever has a figure calls `record`, without knowing what becomes of it: nothing, unless a process
of a Ray session has called `send_to` (`qresafe.dist.metrics`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from upath import UPath

SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # a histogram's upper bounds


@dataclass(frozen=True)
class Metric:
    """What a name stands for.

    Attributes:
        kind: A counter's exported name ends in `_total`, a histogram's in `_bucket` and others.
        labels: What it is told apart by.
        meaning: In words.
        needs_gpu: Exported only where there is one.
    """

    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    meaning: str
    needs_gpu: bool = False


_BATCH, _STEP = ("run", "stage"), ("run",)

METRICS: Mapping[str, Metric] = {
    "qresafe_stage_done": Metric("gauge", _BATCH, "units of the open stage that are finished"),
    "qresafe_stage_total": Metric("gauge", _BATCH, "units that it has"),
    "qresafe_rows": Metric("counter", _BATCH, "rows that workers have computed"),
    "qresafe_generated_tokens": Metric("counter", _BATCH, "tokens that they have generated"),
    "qresafe_error_rows": Metric("counter", _BATCH, "rows that have an error for an answer"),
    "qresafe_batch_seconds": Metric("histogram", _BATCH, "time of a batch"),
    "qresafe_steps": Metric("counter", _STEP, "optimizer steps of the patch"),
    "qresafe_loss": Metric("gauge", _STEP, "loss of the last step"),
    "qresafe_trained_tokens": Metric("counter", _STEP, "answer tokens that steps have seen"),
    "qresafe_step_seconds": Metric("histogram", (*_STEP, "rank"), "time of a step, by rank"),
    "qresafe_restarts": Metric("counter", _STEP, "restarts of all training workers after a loss"),
    "qresafe_gpu_bytes": Metric("gauge", _BATCH, "most GPU memory that torch held", needs_gpu=True),
}

Sink = Callable[[str, float, Mapping[str, str]], None]
_sink: list[Sink] = []  # of this process: one or none


def send_to(sink: Sink | None) -> None:
    """Hand what this process records to `sink`; None: to nobody."""
    _sink[:] = [sink] if sink else []


def record(name: str, value: float, labels: Mapping[str, str]) -> None:
    """Add `value` to a counter, set a gauge to it, or note it in a histogram; never raises."""
    for sink in _sink:
        with suppress(Exception):  # a figure that is lost must not cost the run
            sink(name, value, labels)


def recording() -> bool:
    """Return whether anybody listens: a figure that costs something need not be computed else."""
    return bool(_sink)


def place(folder: UPath) -> dict[str, str]:
    """Return the labels of a folder <storage>/runs/<run>/<stage>/...; empty ones elsewhere."""
    parts = [part.strip("/") for part in folder.parts]
    after = parts[len(parts) - parts[::-1].index("runs") :] if "runs" in parts else []
    run, stage = (*after, "", "")[:2]
    return {"run": run, "stage": stage}
