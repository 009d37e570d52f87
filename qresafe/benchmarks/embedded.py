"""The embedded model's own evaluation prompts, by axis and split."""

from __future__ import annotations

import pyarrow as pa

from qresafe.benchmarks.base import DEFAULT_AXIS
from qresafe.embedded.corpus import evaluation_prompts
from qresafe.errors import SpecError
from qresafe.specs import PromptSetSpec

OF_FILES = ("path", "column", "target_column", "category_column", "lang_column", "subset")


def load(spec: PromptSetSpec) -> pa.Table:
    """Return the prompts of one axis; `spec.split` is "dev" (to choose on) or "test".

    Raises:
        SpecError: The spec describes a file: its prompts would not be the ones that are measured.
        DataError: No such split.
    """
    for key in OF_FILES:
        if (value := getattr(spec, key)) is not None:
            what = f"the benchmark 'embedded' takes no {key} (got {value!r})"
            remedy = f"add `benchmark: prompts`, or another of `qresafe benchmarks`, beside {key}"
            raise SpecError(what, where="the prompt set", remedy=remedy)
    return evaluation_prompts(spec.axis or DEFAULT_AXIS, spec.split)
