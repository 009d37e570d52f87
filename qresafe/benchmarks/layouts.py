"""Folders of public prompt sets that are no single table."""

from __future__ import annotations

import csv
from pathlib import Path

import pyarrow as pa

from qresafe.errors import DataError
from qresafe.hf.tables import read_splits


def file_of_split(folder: str, pattern: str, split: str) -> str:
    """Return the file of a split in a folder, or the folder itself if `datasets` made it.

    Args:
        folder: A local folder.
        pattern: The file's name, with `{split}` in it.
        split: "val", "test", "all", ...

    Raises:
        DataError: The folder has files of other splits only.
    """
    file = Path(folder) / pattern.format(split=split)
    if file.is_file():
        return str(file)
    before, after = pattern.split("{split}")
    others = [path.name for path in sorted(Path(folder).glob(pattern.format(split="*")))]
    if others:
        known = ", ".join(name.removeprefix(before).removesuffix(after) for name in others)
        raise DataError(f"no split {split!r}", where=folder, remedy=f"set split to one of {known}")
    return folder


def headerless(path: str, pattern: str) -> pa.Table:
    """Return the columns prompt and category of files that hold prompts alone, without a header.

    Any reader of tables takes the first prompt of such a file for its header; it is taken back.

    Args:
        path: A local folder of such files, or what `hf.tables.read_splits` reads: a hub id or
            `datasets` folder with one split for each category, or one table with a header.
        pattern: The names of the files in a local folder; the category is a file's stem.

    Raises:
        DataError: The source cannot be read.
    """
    files = sorted(Path(path).expanduser().glob(pattern), key=_natural)
    if files:
        named = {file.stem: _lines(file) for file in files}
    else:
        splits = read_splits(path)
        if any(table.num_columns > 1 for table in splits.values()):
            return pa.concat_tables(splits.values(), promote_options="default")
        named = {name: _first_column(table) for name, table in splits.items()}
    rows = [(prompt, name) for name, prompts in named.items() for prompt in prompts]
    return pa.table(
        {
            "prompt": pa.array([prompt for prompt, _ in rows], pa.string()),
            "category": pa.array([name for _, name in rows], pa.string()),
        }
    )


def _lines(file: Path) -> list[str]:
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            # An unquoted comma belongs to its prompt: there is one column.
            return [",".join(row).strip() for row in csv.reader(lines) if "".join(row).strip()]
    except UnicodeDecodeError:
        raise DataError("not UTF-8 text", where=str(file), remedy="save it as UTF-8") from None


def _first_column(table: pa.Table) -> list[str]:
    name = table.column_names[0]
    header = [] if name.lower() in ("prompt", "instruction", "text") else [name]
    return [*header, *table.column(0).to_pylist()]


def _natural(file: Path) -> tuple[int, str]:
    digits = "".join(filter(str.isdigit, file.stem))
    return int(digits or 0), file.stem
