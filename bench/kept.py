"""Measured rows, each a JSON file in a storage, and all in a JSONL beside the page they make."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qresafe.artifacts import write_text


def take(file: Path, storage: str) -> None:
    """Put the rows of a JSONL among those measured, where these have none."""
    (Path(storage) / "rows").mkdir(parents=True, exist_ok=True)
    for line in file.read_text().splitlines():
        kept = json.loads(line)
        path = Path(storage) / "rows" / f"{kept.pop('key')}.json"
        if not path.exists():
            write_text(path, json.dumps(kept))


def write_rows(rows: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """Put measured rows, by their keys, into a JSONL, in the place of equals."""
    old = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    held = {kept["key"]: kept for kept in old} | {
        key: {"key": key, **kept} for key, kept in rows.items()
    }
    write_text(file, "".join(json.dumps(held[key]) + "\n" for key in sorted(held)))


def between(days: Iterable[str]) -> str:
    """Return the day on which rows were measured, or the first and the last one."""
    known = sorted(days)
    return " to ".join(dict.fromkeys((known[0], known[-1])))
