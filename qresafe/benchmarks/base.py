"""What a benchmark is: a function from a `PromptSetSpec` to a table of prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import pyarrow as pa

from qresafe import records, registry
from qresafe.errors import DataError, nearest
from qresafe.specs import PromptSetSpec

PROMPT_COLUMNS = (
    "prompt",
    "goal",
    "behavior",
    "forbidden_prompt",
    "instruction",
    "question",
    "query",
    "text",
)
TARGET_COLUMNS = ("target", "reference", "answer", "output")
CATEGORY_COLUMNS = ("category", "semanticcategory", "type")


class Benchmark(Protocol):
    """Loads the prompts that a spec asks for; raises `DataError` before any expensive work."""

    def __call__(self, spec: PromptSetSpec) -> pa.Table: ...


def load(spec: PromptSetSpec) -> pa.Table:
    """Return the prompts of a benchmark (`records.PROMPT`), cut to `spec.limit`.

    Raises:
        SpecError: The benchmark is not registered.
        DataError: Its data is missing or malformed.
    """
    benchmark: Benchmark = registry.benchmarks.get(spec.benchmark)
    table = benchmark(spec)
    return table if spec.limit is None else table.slice(0, spec.limit)


def find_column(table: pa.Table, chosen: str | None, known: Sequence[str], where: str) -> str:
    """Return the chosen column's name, or the first known one that occurs, whatever its case.

    Args:
        table: The table as read.
        chosen: What the user asked for, if anything.
        known: Lower-case names to look for otherwise, best first.
        where: The file, for the message.

    Raises:
        DataError: The chosen column is missing, or no known one occurs.
    """
    names = list(table.column_names)
    if chosen is not None:
        if chosen in names:
            return chosen
        raise DataError(f"no column {chosen!r}", where=where, remedy=nearest(chosen, names))
    found = optional_column(table, known)
    if found is None:
        remedy = f"set column to one of {', '.join(names)}"
        raise DataError("no prompt column of a known name", where=where, remedy=remedy)
    return found


def optional_column(table: pa.Table, known: Sequence[str]) -> str | None:
    """Return the first known column that occurs, whatever its case; None if none does."""
    by_name = {name.lower(): name for name in reversed(table.column_names)}
    return next((by_name[name] for name in known if name in by_name), None)


def text_column(table: pa.Table, name: str, where: str) -> list[str | None]:
    """Return a column's values.

    Raises:
        DataError: The column holds something other than text.
    """
    column = table.column(name)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        remedy = "name a column of strings (and save the file as UTF-8)"
        raise DataError(
            f"column {name!r} holds {column.type}, not text", where=where, remedy=remedy
        )
    return list(column.to_pylist())


def prompt_table(
    prompts: Sequence[str | None],
    *,
    spec: PromptSetSpec,
    where: str,
    targets: Sequence[str | None] | None = None,
    categories: Sequence[str | None] | None = None,
) -> pa.Table:
    """Check prompts and return them as `records.PROMPT`.

    A prompt's id depends on its text alone, so it stays when rows are added or reordered.

    Args:
        prompts: One per row.
        spec: Names benchmark and axis.
        where: The file, for messages.
        targets: Reference answers, one per row.
        categories: One per row.

    Raises:
        DataError: There are no rows, or a prompt is empty or occurs twice.
    """
    if not prompts:
        raise DataError("there are no prompts", where=where, remedy="add at least one row")
    _check_prompts(prompts, where)
    rows = len(prompts)
    columns = {
        "prompt_id": [_prompt_id(spec.benchmark, str(prompt)) for prompt in prompts],
        "axis": [spec.axis] * rows,
        "prompt": prompts,
        "target": targets or [None] * rows,
        "category": categories or [None] * rows,
        "lang": [None] * rows,
        "benchmark": [spec.benchmark] * rows,
    }
    return pa.table(columns, schema=records.PROMPT)


def _check_prompts(prompts: Sequence[str | None], where: str) -> None:
    first_row: dict[str, int] = {}
    for row, prompt in enumerate(prompts, 1):
        if prompt is None or not prompt.strip():
            remedy = "fill it in or remove the row"
            raise DataError(f"the prompt of row {row} is empty", where=where, remedy=remedy)
        if prompt in first_row:
            what = f"rows {first_row[prompt]} and {row} hold the same prompt"
            remedy = "remove one: a prompt that counts twice makes the intervals too narrow"
            raise DataError(what, where=where, remedy=remedy)
        first_row[prompt] = row


def _prompt_id(benchmark: str, prompt: str) -> str:
    return f"{benchmark}-{hashlib.sha256(prompt.encode()).hexdigest()[:12]}"
