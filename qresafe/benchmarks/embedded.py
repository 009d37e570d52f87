"""The embedded model's own evaluation prompts, by axis and split."""

from __future__ import annotations

import pyarrow as pa

from qresafe.benchmarks.base import DEFAULT_AXIS
from qresafe.embedded.corpus import evaluation_prompts
from qresafe.specs import PromptSetSpec


def load(spec: PromptSetSpec) -> pa.Table:
    """Return the prompts of one axis; `spec.split` is "dev" (to choose on) or "test".

    Raises:
        DataError: No such split.
    """
    return evaluation_prompts(spec.axis or DEFAULT_AXIS, spec.split)
