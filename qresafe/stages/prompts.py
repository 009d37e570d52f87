"""The prompts of an experiment: benchmarks to evaluate on, and the pool that pairs come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import pyarrow as pa

from qresafe.benchmarks.base import (
    find_column,
    load,
    prompt_table,
    sources_of,
    text_column,
    with_sources,
)
from qresafe.errors import DataError, nearest
from qresafe.hf.tables import read_table
from qresafe.records import PROMPT, Axis, Kind
from qresafe.specs import PairsSpec, PromptSetSpec


def evaluation_prompts(sets: Sequence[PromptSetSpec]) -> pa.Table:
    """Return the prompts of all sets, in their order (`records.PROMPT`).

    Raises:
        DataError: There is no set, or a file is malformed.
    """
    if not sets:
        remedy = "name at least one prompt set"
        raise DataError("there are no prompts", where="evaluate.prompts", remedy=remedy)
    tables = [load(one) for one in sets]
    sources = {name: told for table in tables for name, told in sources_of(table).items()}
    return with_sources(pa.concat_tables(table.cast(PROMPT) for table in tables), sources)


def calibration_prompts(spec: PairsSpec) -> pa.Table:
    """Return the prompts that W and Q0 both answer, the kind of each in its `axis` column.

    They are those of the benchmarks in `spec.prompts`, else those of the user's own file with
    columns prompt and axis, else the embedded pool's.

    Raises:
        DataError: A file is malformed, or an axis is none of `records.Kind`.
    """
    if spec.prompts:
        return evaluation_prompts(spec.prompts)
    if spec.path is None:
        from qresafe.embedded.calibration import calibration_prompts as embedded

        return embedded(spec)
    table = read_table(spec.path, "train")
    kinds = text_column(table, find_column(table, "axis", (), spec.path), spec.path)
    for kind in dict.fromkeys(kinds):
        if kind not in get_args(Kind):
            remedy = nearest(str(kind), get_args(Kind))
            raise DataError(f"axis {kind!r}", where=spec.path, remedy=remedy)
    texts = text_column(table, find_column(table, None, ("prompt",), spec.path), spec.path)
    named = PromptSetSpec(benchmark="calibration", path=spec.path)
    made = prompt_table(texts, spec=named, where=spec.path)
    return made.set_column(made.column_names.index("axis"), made.schema.field("axis"), [kinds])


def file_prompts(path: str) -> pa.Table:
    """Return the prompts of one file (`records.PROMPT`); all harmful without a column axis.

    Raises:
        DataError: The file is malformed, or an axis is none of `records.Axis`.
    """
    made = load(PromptSetSpec(benchmark="prompts", path=path))
    table = read_table(path, "test")
    if "axis" not in table.column_names:
        return made
    axes = text_column(table, "axis", path)
    for axis in dict.fromkeys(axes):
        if axis not in get_args(Axis):
            raise DataError(f"axis {axis!r}", where=path, remedy=nearest(str(axis), get_args(Axis)))
    return made.set_column(made.column_names.index("axis"), made.schema.field("axis"), [axes])
