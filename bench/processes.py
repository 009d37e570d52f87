"""Rows of a benchmark in processes of their own, on one thread each."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def in_processes(work: Callable[[Any], None], tasks: Iterable[Any], processes: int) -> None:
    """Call `work` on every task, `processes` at a time; return when all are done.

    Args:
        work: Picklable.
        tasks: Started in their order.
        processes: Each computes on one thread.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=one_thread) as pool:
        for task in [pool.submit(work, task) for task in tasks]:
            task.result()


def one_thread() -> None:
    """Let torch use one thread in this process."""
    import torch

    torch.set_num_threads(1)
