"""Completions that another program made, taken in as if a `generate` stage had made them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from qresafe.artifacts import Artifact, Run, content_key, hash_file, read_manifest
from qresafe.errors import DataError
from qresafe.records import COMPLETION, require_columns
from qresafe.stages.generate import FILE
from qresafe.stages.runtime import Row, write_table

CODE_VERSION = 1
NEEDED = pa.schema([COMPLETION.field("prompt"), COMPLETION.field("completion")])
# What a foreign file need not say; lengths of 0 and no ids mean "not known".
DEFAULTS: Row = {
    "axis": "harmful",
    "sample": 0,
    "completion_ids": [],
    "prompt_tokens": 0,
    "new_tokens": 0,
    "finish": "stop",
}


def completions_of(run: Run, source: Path) -> Artifact:
    """Return the completions at `source` as an artefact.

    Args:
        run: Where a foreign file's copy goes.
        source: The folder of a finished `generate` stage, or its completions.parquet, or a
            Parquet file with at least the columns prompt and completion. Where axis is missing,
            prompts are harmful; where prompt_id is, equal prompts are the same prompt.

    Raises:
        DataError: There is no such file, or it is malformed.
        CorruptArtifactError: A finished stage's folder is not as its manifest says.
    """
    folder = source if source.is_dir() else source.parent
    if (folder / "DONE").exists() and (source.is_dir() or source.name == FILE):
        return Artifact(path=UPath(folder), manifest=read_manifest(UPath(folder)), reused=True)
    if not source.is_file():
        remedy = f"give a Parquet file, or a folder with {FILE} of a finished generate stage"
        raise DataError("no completions", where=str(source), remedy=remedy)
    rows = _read(source)

    def work(folder: UPath) -> Mapping[str, Any]:
        write_table(folder / FILE, pa.Table.from_pylist(rows, schema=COMPLETION))
        return {"rows": len(rows), "from": str(source)}

    return run.stage(
        "import",
        spec={},
        # The prompts are an input of their own: `compare` asks whether they are the same.
        inputs={
            "file": hash_file(source),
            "prompts": content_key(sorted([row["prompt_id"], row["axis"]] for row in rows)),
        },
        code_version=CODE_VERSION,
        work=work,
    )


def _read(source: Path) -> list[Row]:
    try:
        table = pq.read_table(source)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError("not a Parquet file", where=str(source)) from error
    require_columns(table, NEEDED, str(source))
    rows = [_completed(row) for row in table.to_pylist()]
    if not rows:
        raise DataError("no completion", where=str(source), remedy="give at least one")
    if len({(row["prompt_id"], row["sample"]) for row in rows}) < len(rows):
        remedy = "number repeated answers by a column `sample`, or make prompt_id unique"
        raise DataError("two completions of the same prompt", where=str(source), remedy=remedy)
    return rows


def _completed(row: Row) -> Row:
    given = {key: value for key, value in row.items() if value is not None}
    return {"prompt_id": content_key(row["prompt"]), **DEFAULTS, "completion": "", **given}
