"""Tables from CSV, JSONL, Parquet, a saved `datasets` folder or a hub id, whole or one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from qresafe.errors import DataError
from qresafe.jsonl import read_jsonl


def read_table(path: str, split: str | None = None) -> pa.Table:
    """Read a user's table.

    Args:
        path: A .csv, .jsonl or .parquet file, a folder made by `datasets`' save_to_disk, or a
            data set's id on the Hugging Face hub ("owner/name").
        split: The split to take, where the source has splits.

    Raises:
        DataError: The source is missing, of an unknown kind, or malformed; the message says where.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        return _saved_dataset(file, split)
    readers: dict[str, Callable[[Path], pa.Table]] = {
        ".csv": _csv,
        ".jsonl": _jsonl,
        ".parquet": _parquet,
    }
    if file.suffix.lower() in readers:
        if not file.is_file():
            raise DataError(f"no such file {path!r}", remedy="check the path")
        return readers[file.suffix.lower()](file)
    if file.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
        remedy = "give a .csv, .jsonl or .parquet file, a datasets folder, or a hub id owner/name"
        raise DataError(f"cannot tell what {path!r} is", remedy=remedy)
    return _hub_dataset(path, split)


def _csv(file: Path) -> pa.Table:
    from pyarrow import csv

    try:
        # One thread: only then do the reader's messages name the row.
        table = csv.read_csv(
            file,
            read_options=csv.ReadOptions(use_threads=False),
            parse_options=csv.ParseOptions(newlines_in_values=True),
        )
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        remedy = "quote values that hold commas, and save as UTF-8"
        raise _malformed("CSV", file, error, remedy) from None
    names = table.column_names
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"two columns are called {twice!r}", where=str(file), remedy="rename one")
    return table


def _jsonl(file: Path) -> pa.Table:
    rows = list(read_jsonl(file))
    if not rows:
        raise DataError("the file is empty", where=str(file), remedy="add at least one line")
    columns: dict[str, list[object]] = {}
    for number, row in rows:
        if missing := rows[0][1].keys() - row.keys():
            where = f"{file}, line {number}"
            remedy = "give every line the keys of the first"
            raise DataError(f"no key {min(missing)!r}", where=where, remedy=remedy)
    for name in rows[0][1]:
        columns[name] = [row[name] for _, row in rows]
    return pa.table({name: _column(file, name, values) for name, values in columns.items()})


def _column(file: Path, name: str, values: list[object]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        remedy = "give it one type in all lines"
        raise _malformed(f"key {name!r}", file, error, remedy) from None


def _parquet(file: Path) -> pa.Table:
    from pyarrow import parquet

    try:
        return parquet.read_table(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise _malformed("Parquet", file, error, "write the file again") from None


def _saved_dataset(folder: Path, split: str | None) -> pa.Table:
    from datasets import DatasetDict, load_from_disk

    try:
        data = load_from_disk(str(folder))
    except (FileNotFoundError, ValueError, KeyError, pa.ArrowInvalid) as error:
        remedy = "give a folder made by datasets' save_to_disk"
        raise _malformed("datasets folder", folder, error, remedy) from None
    return _arrow(_pick(data, split, str(folder)) if isinstance(data, DatasetDict) else data)


def _hub_dataset(name: str, split: str | None) -> pa.Table:
    from datasets import DatasetDict, load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        data = load_dataset(name)
    except (DatasetsError, HfHubHTTPError, OSError, ValueError) as error:
        remedy = "check the name and the connection, log in if it is gated, or give a local file"
        raise DataError(
            f"cannot load the data set {name!r} from the Hugging Face hub ({_first_line(error)})",
            remedy=remedy,
        ) from None
    return _arrow(_pick(data, split, name) if isinstance(data, DatasetDict) else data)


def _pick(data: dict[str, object], split: str | None, where: str) -> object:
    if split in data:
        return data[split]
    if len(data) == 1:
        return next(iter(data.values()))
    remedy = f"set split to one of {', '.join(data)}"
    raise DataError(f"no split {split!r}", where=where, remedy=remedy)


def _arrow(data: object) -> pa.Table:
    return data.with_format("arrow")[:]  # type: ignore[attr-defined]


def _malformed(kind: str, file: Path, error: Exception, remedy: str) -> DataError:
    return DataError(f"malformed {kind} ({_first_line(error)})", where=str(file), remedy=remedy)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
