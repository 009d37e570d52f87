"""JSON Lines files of users: read line by line, so that a mistake is named by its line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qresafe.errors import DataError


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of every line that is not blank.

    Raises:
        DataError: The file is missing or not UTF-8, or a line is no JSON object.
    """
    number = 0
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _parse(line, f"{path}, line {number}")
    except FileNotFoundError:
        raise DataError("no such file", where=str(path), remedy="give a JSONL file") from None
    except UnicodeDecodeError:
        where = f"{path}, after line {number}"
        raise DataError("not UTF-8 text", where=where, remedy="save it as UTF-8") from None


def _parse(line: str, where: str) -> dict[str, Any]:
    remedy = "write one JSON object per line"
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"malformed JSON ({error})", where=where, remedy=remedy) from None
    if not isinstance(data, dict):
        raise DataError("the line is no JSON object", where=where, remedy=remedy)
    return data
