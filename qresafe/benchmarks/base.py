"""What a benchmark is: a function from a `PromptSetSpec` to a table of prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Protocol

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
LANG_COLUMNS = ("lang", "language", "locale")
DEFAULT_AXIS: records.Axis = "harmful"
# How the answers begin that attacks aim at: a column full of them holds targets, not prompts.
AFFIRMATIVE = ("sure", "here is", "here are", "here's", "certainly", "of course", "absolutely")
SOURCES = b"sources"  # a prompt table's schema metadata: benchmark -> what to cite, as JSON


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


def sources_of(table: pa.Table) -> dict[str, dict[str, Any]]:
    """Return benchmark -> licence, citation and origin, as far as the benchmarks told."""
    told: dict[str, dict[str, Any]] = json.loads((table.schema.metadata or {}).get(SOURCES, b"{}"))
    return told


def with_sources(table: pa.Table, sources: dict[str, dict[str, Any]]) -> pa.Table:
    """Return the table with `sources` in its schema's metadata."""
    return table.replace_schema_metadata({SOURCES: json.dumps(sources)} if sources else None)


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
    if not _is_text(column.type):
        remedy = "name a column of strings (and save the file as UTF-8)"
        raise DataError(
            f"column {name!r} holds {column.type}, not text", where=where, remedy=remedy
        )
    return list(column.to_pylist())


def optional_text(
    table: pa.Table, chosen: str | None, known: Sequence[str], where: str
) -> list[str | None]:
    """Return the values of the chosen or first known column, all None where there is none.

    Raises:
        DataError: The chosen column is missing or holds no text.
    """
    name = find_column(table, chosen, (), where) if chosen else optional_column(table, known)
    if name is None or (not chosen and pa.types.is_null(table.column(name).type)):
        return [None] * table.num_rows
    return text_column(table, name, where)


def turns_column(
    table: pa.Table, name: str, where: str
) -> tuple[list[str | None], list[list[str] | None]]:
    """Return first messages and follow-ups of a column of text, or of lists of messages.

    Raises:
        DataError: The column holds neither.
    """
    kind = table.column(name).type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not _is_text(
        kind.value_type
    ):
        return text_column(table, name, where), [None] * table.num_rows
    turns = [value or [None] for value in table.column(name).to_pylist()]
    return [first for first, *_ in turns], [rest or None for _, *rest in turns]


def refuse_swapped(
    prompts: Sequence[str | None], targets: Sequence[str | None], where: str
) -> None:
    """Notice a file whose header names its prompts `target` and its targets `goal`.

    Raises:
        DataError: More than half of the prompts begin as answers do, and more of them than of the
            targets.
    """
    answers = sum(map(_is_affirmative, prompts))
    if answers * 2 > len(prompts) and answers > sum(map(_is_affirmative, targets)):
        what = f"{answers} of {len(prompts)} goals begin like answers ('Sure, here'), as targets do"
        raise DataError(what, where=where, remedy="swap the columns goal and target")


def _is_affirmative(text: str | None) -> bool:
    return (text or "").lstrip(" \"'").lower().startswith(AFFIRMATIVE)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def prompt_table(
    prompts: Sequence[str | None],
    *,
    spec: PromptSetSpec,
    where: str,
    targets: Sequence[str | None] | None = None,
    categories: Sequence[str | None] | None = None,
    langs: Sequence[str | None] | None = None,
    follow_ups: Sequence[list[str] | None] | None = None,
) -> pa.Table:
    """Check prompts and return them as `records.PROMPT`.

    A prompt's id depends on its text alone, so it stays when rows are added or reordered.

    Args:
        prompts: One per row.
        spec: Names benchmark and axis.
        where: The file, for messages.
        targets: Reference answers, one per row.
        categories: One per row.
        langs: One per row.
        follow_ups: What the user says after the first answer, one list per row.

    Raises:
        DataError: There are no rows, or a prompt is empty or occurs twice.
    """
    if not prompts:
        raise DataError("there are no prompts", where=where, remedy="add at least one row")
    _check_prompts(prompts, where)
    rows = len(prompts)
    columns = {
        "prompt_id": [_prompt_id(spec.benchmark, str(prompt)) for prompt in prompts],
        "axis": [spec.axis or DEFAULT_AXIS] * rows,
        "prompt": prompts,
        "target": targets or [None] * rows,
        "category": categories or [None] * rows,
        "lang": langs or [None] * rows,
        "benchmark": [spec.benchmark] * rows,
        "follow_ups": follow_ups or [None] * rows,
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
