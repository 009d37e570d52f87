"""Any prompt file: CSV, JSONL, Parquet, a `datasets` folder or a hub id."""

from __future__ import annotations

import pyarrow as pa

from qresafe.benchmarks.base import (
    CATEGORY_COLUMNS,
    PROMPT_COLUMNS,
    TARGET_COLUMNS,
    find_column,
    optional_column,
    prompt_table,
    text_column,
)
from qresafe.errors import DataError
from qresafe.hf.tables import read_table
from qresafe.specs import PromptSetSpec


def load(spec: PromptSetSpec) -> pa.Table:
    """Return the prompts of `spec.path`, from `spec.column` or the first column of a known name.

    Reference answers come from `spec.target_column`, else from a column named target, reference,
    answer or output, if there is one.

    Raises:
        DataError: There is no path, the file is malformed, or a column is missing or not text.
    """
    if not spec.path:
        remedy = "set the prompt set's path to a CSV, JSONL or Parquet file, or a hub id"
        raise DataError("the benchmark 'prompts' has no path", remedy=remedy)
    table = read_table(spec.path, spec.split)
    column = find_column(table, spec.column, PROMPT_COLUMNS, spec.path)
    target = (
        find_column(table, spec.target_column, (), spec.path)
        if spec.target_column
        else optional_column(table, TARGET_COLUMNS)
    )
    category = optional_column(table, CATEGORY_COLUMNS)
    return prompt_table(
        text_column(table, column, spec.path),
        spec=spec,
        where=spec.path,
        targets=text_column(table, target, spec.path) if target else None,
        categories=text_column(table, category, spec.path) if category else None,
    )
