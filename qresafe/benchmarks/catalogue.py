"""The public prompt sets: what catalogue.yaml says of each, and the one loader that reads it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from qresafe.benchmarks.base import (
    LANG_COLUMNS,
    find_column,
    optional_column,
    optional_text,
    prompt_table,
    refuse_swapped,
    turns_column,
    with_sources,
)
from qresafe.benchmarks.layouts import file_of_split, headerless
from qresafe.errors import DataError, SpecError, nearest
from qresafe.hf.tables import read_table
from qresafe.loading import read_yaml
from qresafe.records import Axis
from qresafe.specs import PromptSetSpec

FILE = Path(__file__).with_name("catalogue.yaml")
CONTEXT_FIRST = "{context}\n\n---\n\n{prompt}"  # as HarmBench joins them
SUBSET = "{subset}"


class _Closed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rows(_Closed):
    """Where the rows of one axis are.

    Attributes:
        config: On the hub; `{subset}` stands for the subset's.
        split: On the hub.
        where: Column -> the values of rows to keep; `{subset}` stands for the subset's name.
        optional: Columns of `where` that a table may lack.
    """

    config: str | None = None
    split: str | None = None
    where: dict[str, list[str]] = {}
    optional: tuple[str, ...] = ()


class Entry(_Closed):
    """One public prompt set; `prompt` to `lang` are column names in lower case, best first.

    Attributes:
        title: Its name for people.
        licence: Of the prompts.
        citation: Whom to cite.
        axes: Axis -> its rows; the first is the default.
        hub: Its id on the Hugging Face hub.
        source: Where its files come from otherwise.
        gated: Whether the hub asks for a log-in.
        subsets: Name -> config on the hub; the first is the default.
        folder: The file of a split in a local folder.
        headerless: The files of a local folder that hold prompts alone, one file per category.
    """

    title: str
    licence: str
    citation: str
    axes: dict[Axis, Rows]
    prompt: tuple[str, ...]
    target: tuple[str, ...] = ()
    category: tuple[str, ...] = ()
    lang: tuple[str, ...] = LANG_COLUMNS
    context: tuple[str, ...] = ()
    hub: str | None = None
    source: str
    gated: bool = False
    subsets: dict[str, str] = {}
    folder: str | None = None
    headerless: str | None = None


@cache
def catalogue() -> dict[str, Entry]:
    """Return name -> entry of every public prompt set."""
    data = read_yaml(FILE.read_text("utf-8"))
    return {name: Entry.model_validate(entry) for name, entry in data.items()}


def load(spec: PromptSetSpec) -> pa.Table:
    """Return the prompts of a public set, with its licence and citation in the schema's metadata.

    The table comes from `spec.path`, else from the path in $QRESAFE_<NAME>, else from the hub.
    Prompts that occur again are dropped and counted.

    Raises:
        SpecError: The set has no such axis or subset.
        DataError: The data cannot be found or is malformed, or goals and targets look swapped.
    """
    entry = catalogue()[spec.benchmark]
    first: Axis = next(iter(entry.axes))
    axis = spec.axis or first
    subset = spec.subset or next(iter(entry.subsets), None)
    _check_choice(spec, "axis", axis, entry.axes)
    if subset is not None:
        _check_choice(spec, "subset", subset, entry.subsets)
    where = _path(spec, entry)
    rows = entry.axes[axis]
    table = _keep(_read(spec, entry, rows, subset, where), rows, subset, where)
    found, repeats = _without_repeats(_prompts(table, spec, entry, axis, where))
    told = entry.model_dump(include={"title", "licence", "citation"})
    return with_sources(found, {spec.benchmark: told | {"origin": where, "repeats": repeats}})


def _check_choice(spec: PromptSetSpec, kind: str, chosen: str, known: Iterable[str]) -> None:
    if chosen not in [*known]:
        remedy = nearest(chosen, known) if [*known] else f"leave {kind} out"
        raise SpecError(f"{spec.benchmark} has no {kind} {chosen!r}", remedy=remedy)


def _path(spec: PromptSetSpec, entry: Entry) -> str:
    variable = environment(spec.benchmark)
    path = spec.path or os.environ.get(variable) or entry.hub
    if not path:
        remedy = f"set {variable} or the prompt set's path to a copy of {entry.source}"
        raise DataError(f"no path to {spec.benchmark}", remedy=remedy)
    return path


def environment(name: str) -> str:
    """Return the environment variable that may hold a benchmark's path."""
    return f"QRESAFE_{name.upper()}"


def _read(
    spec: PromptSetSpec, entry: Entry, rows: Rows, subset: str | None, where: str
) -> pa.Table:
    # A split that the user names wins over the set's own.
    split = spec.split if "split" in spec.model_fields_set else rows.split or spec.split
    config = rows.config
    if config == SUBSET and subset is not None:
        config = entry.subsets[subset]
    if entry.headerless:
        return headerless(where, entry.headerless)
    if entry.folder and Path(where).is_dir():
        where = file_of_split(where, entry.folder, spec.split)
    try:
        return read_table(where, split, config)
    except DataError as error:
        if where != entry.hub:
            raise
        told = f"{error.remedy} of {entry.source}, by path or {environment(spec.benchmark)}"
        raise DataError(error.what, where=error.where, remedy=told) from None


def _keep(table: pa.Table, rows: Rows, subset: str | None, where: str) -> pa.Table:
    for name, accepted in rows.where.items():
        column = optional_column(table, (name.lower(),))
        if column is None and name in rows.optional:
            continue
        if column is None:
            remedy = f"take the original file: the column says which rows are {accepted[0]}"
            raise DataError(f"no column {name!r}", where=where, remedy=remedy)
        values = [subset if value == SUBSET else value for value in accepted]
        table = table.filter(pc.is_in(table.column(column), pa.array(values)))
    return table


def _prompts(
    table: pa.Table, spec: PromptSetSpec, entry: Entry, axis: Axis, where: str
) -> tuple[PromptSetSpec, str, dict[str, list[object]]]:
    column = find_column(table, spec.column, entry.prompt, where)
    prompts, follow_ups = turns_column(table, column, where)
    targets = optional_text(table, spec.target_column, entry.target, where)
    refuse_swapped(prompts, targets, where)
    contexts = optional_text(table, None, entry.context, where)
    columns: dict[str, list[object]] = {
        "prompts": [_in_context(p, c) for p, c in zip(prompts, contexts, strict=True)],
        "targets": [*targets],
        "categories": [*optional_text(table, spec.category_column, entry.category, where)],
        "langs": [*optional_text(table, spec.lang_column, entry.lang, where)],
        "follow_ups": [*follow_ups],
    }
    return spec.model_copy(update={"axis": axis}), where, columns


def _in_context(prompt: str | None, context: str | None) -> str | None:
    if not context or prompt is None:
        return prompt
    return CONTEXT_FIRST.format(context=context, prompt=prompt)


def _without_repeats(
    given: tuple[PromptSetSpec, str, dict[str, list[object]]],
) -> tuple[pa.Table, int]:
    """Return the table and how many rows repeated an earlier prompt."""
    spec, where, columns = given
    prompts = columns.pop("prompts")
    first = {prompt: row for row, prompt in reversed([*enumerate(prompts)])}
    kept = sorted(first.values())
    chosen = {name: [values[row] for row in kept] for name, values in columns.items()}
    texts = [prompts[row] for row in kept]
    table = prompt_table(texts, spec=spec, where=where, **chosen)  # type: ignore[arg-type]
    return table, len(prompts) - len(kept)
