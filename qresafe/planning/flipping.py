"""Peak memory of a discrete patch (`patch.method: flips`)."""

from __future__ import annotations

from dataclasses import replace

from qresafe.planning import memory
from qresafe.planning.memory import Batch, Parts, Patching
from qresafe.planning.shapes import ModelShape

SUMS = 8  # bytes of a weight's gradient: float64, so that workers may add in any order
CODES = 2  # Q0's and the present ones, a byte each
GAINS = 4 * 4 + 2  # of a layer's weights: both gains, a decoded neighbour, its change, two codes


def flips(shape: ModelShape, how: Patching, batch: Batch) -> Parts:
    """Return the parts of the peak; every worker holds all of them.

    There is no adapter, mask or optimizer, but the decoded model and a sum per weight.

    Args:
        shape: Of the model.
        how: Of this, the group size, the device and whether activations are computed again.
        batch: Rows of one forward pass.
    """
    scales = shape.bytes * shape.quantized / how.group_size
    held = {
        memory.WEIGHTS: float(shape.bytes * shape.parameters),
        memory.CODES: CODES * shape.quantized + scales,
        memory.GRADIENTS: float(SUMS * shape.quantized),
    }
    plain = replace(how, on="factors", through_grid=False, trains="weights")
    backward = held | memory.graph(shape, plain, batch)
    backward[memory.GRADIENTS] += shape.bytes * shape.largest
    choosing = held | {memory.SCORES: float(GAINS * shape.largest)}
    return memory.peak([backward, choosing])
