"""The clock of comparisons in turns: what this process computed, not what else the machine did."""

from __future__ import annotations

import time


def now() -> float:
    """Return seconds: CPU time of this process, or, with a GPU, wall time once it is idle."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def kind() -> str:
    """Return what `now` counts, for the table."""
    import torch

    return "wall time" if torch.cuda.is_available() else "process CPU time"
