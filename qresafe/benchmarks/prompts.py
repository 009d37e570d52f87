"""Any prompt file: CSV, JSON, Parquet, text, a `datasets` folder or a hub id."""

from __future__ import annotations

import pyarrow as pa

from qresafe.benchmarks.base import (
    CATEGORY_COLUMNS,
    LANG_COLUMNS,
    PROMPT_COLUMNS,
    TARGET_COLUMNS,
    find_column,
    optional_text,
    prompt_table,
    refuse_swapped,
    turns_column,
)
from qresafe.errors import DataError
from qresafe.hf.tables import read_table
from qresafe.specs import PromptSetSpec


def load(spec: PromptSetSpec) -> pa.Table:
    """Return the prompts of `spec.path`, from `spec.column` or the first column of a known name.

    A column of lists of messages makes prompts of several turns. Reference answers, categories
    and languages come from the spec's columns, else from columns of a known name, if any.

    Raises:
        DataError: There is no path, the file is malformed, a column is missing or not text, or
            prompts and targets look swapped.
    """
    if not spec.path:
        remedy = "set the prompt set's path to a CSV, JSONL or Parquet file, or a hub id"
        raise DataError("the benchmark 'prompts' has no path", remedy=remedy)
    table = read_table(spec.path, spec.split, spec.subset)
    column = find_column(table, spec.column, PROMPT_COLUMNS, spec.path)
    prompts, follow_ups = turns_column(table, column, spec.path)
    targets = optional_text(table, spec.target_column, TARGET_COLUMNS, spec.path)
    refuse_swapped(prompts, targets, spec.path)
    return prompt_table(
        prompts,
        spec=spec,
        where=spec.path,
        targets=targets,
        categories=optional_text(table, spec.category_column, CATEGORY_COLUMNS, spec.path),
        langs=optional_text(table, spec.lang_column, LANG_COLUMNS, spec.path),
        follow_ups=follow_ups,
    )
