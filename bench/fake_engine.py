"""An engine of known latency: it answers nothing, and takes as long as a real batch would.

The formula is that of `hf.generate`: a batch reads its prompts padded to the longest, and then
takes a step per token until its longest answer ends.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from upath import UPath

from qresafe.dist.engines import Stable, load_batch
from qresafe.stages.runtime import Batch, BatchFunction, BatchJob, Row, compute_part


@dataclass(frozen=True)
class Latency:
    """Seconds of a batch.

    Attributes:
        per_prompt_token: Of reading, padding included.
        per_step: Of a new token for all rows at once.
    """

    per_prompt_token: float = 50e-6
    per_step: float = 0.025

    def seconds(self, rows: Sequence[Row]) -> float:
        """Return what these rows take as one batch."""
        read = len(rows) * max(row["size"] for row in rows)
        steps = max(row["answer_tokens"] for row in rows)
        return float(self.per_prompt_token * read + self.per_step * steps)


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and answers.

    Prompts, and answers that are not refusals, are log-normal, as chat data is; refusals are
    short and even.

    Attributes:
        refusals: Share of answers that are refusals.
        answer_median: Of the other answers' tokens, before the limit.
        limit: `generate.max_new_tokens`.
    """

    refusals: float = 0.0
    answer_median: float = 180.0
    limit: int = 512

    def requests(self, count: int, seed: int = 0) -> list[Row]:
        """Return rows as an engine's `requests` would, with what the answer will be beside."""
        draw = np.random.default_rng(seed)
        prompts = np.clip(draw.lognormal(np.log(60), 1.0, count), 1, 2048).astype(int)
        answers = np.clip(draw.lognormal(np.log(self.answer_median), 0.7, count), 1, self.limit)
        short = draw.integers(20, 60, count)
        answers = np.where(draw.random(count) < self.refusals, short, answers).astype(int)
        return [
            {"prompt_id": str(i), "size": size, "answer_tokens": tokens}
            for i, (size, tokens) in enumerate(zip(prompts.tolist(), answers.tolist(), strict=True))
        ]


@dataclass(frozen=True)
class FakeJob:
    """Sleeps for each batch; its part says who computed it and when.

    Attributes:
        latency: Of the engine that is imitated.
        speed: How many times faster the imitation is.
    """

    latency: Latency
    speed: float

    def setup(self, device: str) -> BatchFunction:
        def compute(rows: list[Row]) -> pa.Table:
            began = time.time()
            time.sleep(self.latency.seconds(rows) / self.speed)
            seen = {"process": os.getpid(), "began": began, "ended": time.time()}
            return pa.Table.from_pylist([seen])

        return compute


class LightEngine:
    """`dist.engines.Engine` without torch and transformers, so that many fit on a machine."""

    def __init__(self) -> None:
        self._call = ""
        self._function: BatchFunction | None = None

    def compute(self, call: str, job: BatchJob, batch: str, parts: UPath) -> Row:
        """Compute one batch and write its part, as `Engine.compute` does."""
        if self._function is None or call != self._call:
            self._function, self._call = job.setup("cpu"), call
        return compute_part(self._function, load_batch(batch), parts).row()


class LightStable(Stable):
    """`dist.engines.Stable` that lends light engines."""

    def _start(self, node: str, gpus: str) -> Any:
        placed = NodeAffinitySchedulingStrategy(node, soft=False)
        options = {"num_cpus": 0, "scheduling_strategy": placed}
        return ray.remote(LightEngine).options(**options).remote()


def in_seconds(batches: Sequence[Batch], latency: Latency) -> list[float]:
    """Return what each batch takes."""
    return [latency.seconds(batch.rows) for batch in batches]
