"""Tables from CSV, JSON, Parquet, text, a `datasets` folder or a hub id, whole or one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from qresafe.errors import DataError
from qresafe.jsonl import read_jsonl


def read_table(path: str, split: str | None = None, config: str | None = None) -> pa.Table:
    """Read a user's table.

    Args:
        path: A .csv, .jsonl, .json (a list of objects), .parquet or .txt file (one prompt per
            line, in a column `prompt`), a folder made by `datasets`' save_to_disk, or a data set's
            id on the Hugging Face hub ("owner/name").
        split: The split to take, where the source has splits.
        config: The hub data set's configuration, where it has several.

    Raises:
        DataError: The source is missing, of an unknown kind, or malformed; the message says where.
    """
    return _pick(read_splits(path, config), split, path)


def read_splits(path: str, config: str | None = None) -> dict[str, pa.Table]:
    """Read a user's table with all of its splits; a file has one, called "".

    Args:
        path: As for `read_table`.
        config: As for `read_table`.

    Raises:
        DataError: As `read_table`.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        return _saved_dataset(file)
    readers: dict[str, Callable[[Path], pa.Table]] = {
        ".csv": _csv,
        ".jsonl": _jsonl,
        ".json": _json,
        ".parquet": _parquet,
        ".txt": _lines,
    }
    if file.suffix.lower() in readers:
        if not file.is_file():
            raise DataError(f"no such file {path!r}", remedy="check the path")
        return {"": readers[file.suffix.lower()](file)}
    if file.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
        remedy = (
            "give a .csv, .jsonl, .json, .parquet or .txt file, a datasets folder, or a hub id "
            "owner/name"
        )
        raise DataError(f"cannot tell what {path!r} is", remedy=remedy)
    return _hub_dataset(path, config)


def _csv(file: Path) -> pa.Table:
    from pyarrow import csv

    try:
        # One thread: only then do the reader's messages name the row.
        table = csv.read_csv(
            file,
            read_options=csv.ReadOptions(use_threads=False),
            parse_options=csv.ParseOptions(newlines_in_values=True),
        )
        names = table.column_names
    except (pa.ArrowException, UnicodeDecodeError) as error:
        remedy = "quote values that hold commas, and save as UTF-8"
        raise _malformed("CSV", file, error, remedy) from None
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"two columns are called {twice!r}", where=str(file), remedy="rename one")
    return table


def _jsonl(file: Path) -> pa.Table:
    rows = [(f"{file}, line {number}", row) for number, row in read_jsonl(file)]
    return _from_objects(file, rows, "give every line the keys of the first")


def _json(file: Path) -> pa.Table:
    try:
        data = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _malformed("JSON", file, error, "save a list of objects as UTF-8") from None
    if not isinstance(data, list) or not all(isinstance(row, dict) for row in data):
        raise DataError("no list of objects", where=str(file), remedy="write [{...}, {...}]")
    rows = [(f"{file}, object {number}", row) for number, row in enumerate(data, 1)]
    return _from_objects(file, rows, "give every object the keys of the first")


def _lines(file: Path) -> pa.Table:
    try:
        lines = file.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise _malformed("text", file, error, "save it as UTF-8") from None
    return pa.table({"prompt": pa.array([line for line in lines if line.strip()], pa.string())})


def _from_objects(file: Path, rows: list[tuple[str, dict[str, Any]]], remedy: str) -> pa.Table:
    if not rows:
        raise DataError("the file is empty", where=str(file), remedy="add at least one line")
    names = rows[0][1]
    for where, row in rows:
        if missing := names.keys() - row.keys():
            raise DataError(f"no key {min(missing)!r}", where=where, remedy=remedy)
    columns = [_column(file, name, [row[name] for _, row in rows]) for name in names]
    try:
        return pa.table(columns, names=list(names))
    except UnicodeEncodeError as error:
        raise _malformed("key", file, error, "write keys as whole characters") from None


def _column(file: Path, name: str, values: list[object]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, ValueError, TypeError) as error:
        remedy = "give it one type in all lines"
        raise _malformed(f"key {name!r}", file, error, remedy) from None


def _parquet(file: Path) -> pa.Table:
    from pyarrow import parquet

    try:
        table = parquet.read_table(file)
        table.validate(full=True)  # text that is no UTF-8 is found here, not where it is used
        return table
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _malformed("Parquet", file, error, "write the file again") from None


def _saved_dataset(folder: Path) -> dict[str, pa.Table]:
    from datasets import load_from_disk

    try:
        data = load_from_disk(str(folder))
    except (FileNotFoundError, ValueError, KeyError, pa.ArrowInvalid) as error:
        remedy = "give a folder made by datasets' save_to_disk"
        raise _malformed("datasets folder", folder, error, remedy) from None
    return _tables(data)


def _hub_dataset(name: str, config: str | None) -> dict[str, pa.Table]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        data = load_dataset(name, config)
    except (DatasetsError, HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        remedy = "check the name and the connection, log in if it is gated, or give a local file"
        raise DataError(
            f"cannot load the data set {name!r} from the Hugging Face hub ({_first_line(error)})",
            remedy=remedy,
        ) from None
    return _tables(data)


def _tables(data: Any) -> dict[str, pa.Table]:
    named = data if isinstance(data, dict) else {"": data}
    return {name: part.with_format("arrow")[:] for name, part in named.items()}


def _pick(splits: dict[str, pa.Table], split: str | None, where: str) -> pa.Table:
    if split in splits:
        return splits[split]
    if len(splits) == 1:
        return next(iter(splits.values()))
    remedy = f"set split to one of {', '.join(splits)}"
    raise DataError(f"no split {split!r}", where=where, remedy=remedy)


def _malformed(kind: str, file: Path, error: Exception, remedy: str) -> DataError:
    return DataError(f"malformed {kind} ({_first_line(error)})", where=str(file), remedy=remedy)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
