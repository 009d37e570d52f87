"""The rows of a search: one small JSON file per trial that has ended, and one table of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict
from upath import UPath

from qresafe.artifacts import read_text, write_text
from qresafe.integrity import open_json, sealed_json, tell
from qresafe.stages.runtime import write_table
from qresafe.storage import children

Status = Literal["completed", "stopped", "failed"]


class Row(BaseModel):
    """A trial that has ended.

    Attributes:
        index: Its place in the search, from 0 (the experiment's own spec).
        params: What it sets, by dotted key.
        status: "completed"; "stopped" by the scheduler's rule; or "failed".
        kind: Of a failure: equal kinds count together.
        reason: Of a failure, in words; of a stop, the rule.
        same_as: The earlier trial with an equal spec whose result this is.
        metrics: By `metrics.METRICS`; of a stopped trial, its last probe.
        curve: The probe's figures, each with its step.
        keys: Stage -> key of the artefacts, where there are any.
        continued: Key of the patch whose last checkpoint this one went on from.
        seconds: What the trial took, evaluation included, in the run that ended it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: int
    params: dict[str, Any]
    status: Status
    kind: str | None = None
    reason: str | None = None
    same_as: int | None = None
    metrics: dict[str, float] = {}
    curve: list[dict[str, float | None]] = []
    keys: dict[str, str] = {}
    continued: str | None = None
    seconds: float = 0.0

    def probed(self, metric: str) -> dict[int, float]:
        """Return step -> the probe's value of a metric."""
        found = {int(look["step"] or 0): look.get(metric) for look in self.curve}
        return {step: value for step, value in found.items() if value is not None}


class Ledger:
    """The folder of a search's rows.

    Args:
        folder: Any storage; rows lie in its `trials/`.
    """

    def __init__(self, folder: UPath) -> None:
        self._folder = folder / "trials"

    def read(self) -> dict[int, Row]:
        """Return index -> row of all trials that have ended; a damaged row counts as none."""
        files = [path for path in children(self._folder) if path.name.endswith(".json")]
        rows = [row for path in files if (row := _read(path)) is not None]
        return {row.index: row for row in sorted(rows, key=lambda row: row.index)}

    def write(self, row: Row) -> None:
        """Keep a row; an earlier one of the same index is replaced."""
        self._folder.mkdir(parents=True, exist_ok=True)
        text = sealed_json(row.model_dump(mode="json"), indent=1)
        write_text(self._path(row.index), text)

    def forget(self, index: int) -> None:
        """Remove a row, so that its trial runs again."""
        self._path(index).unlink(missing_ok=True)

    def _path(self, index: int) -> UPath:
        return self._folder / f"{index:05d}.json"


def _read(path: UPath) -> Row | None:
    try:
        return Row.model_validate(open_json(read_text(path)))
    except ValueError:  # also of pydantic, and of text that is no text
        tell(f"damaged file {path}: its trial is run again")
        return None


def trials_table(rows: Sequence[Row], values: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Return the rows as a table: a column for each key of the space and each metric.

    Args:
        rows: In the order of their index.
        values: Each row's value of every key of the space; absent: the key took no part.
    """
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    keys = list(dict.fromkeys(key for given in values for key in given))
    columns: dict[str, Any] = {
        "trial": [row.index for row in rows],
        "status": [row.status for row in rows],
        "reason": pa.array([row.reason for row in rows], pa.string()),
        "same_as": pa.array([row.same_as for row in rows], pa.int64()),
    }
    columns |= {key: _column([given.get(key) for given in values]) for key in keys}
    columns |= {
        name: pa.array([row.metrics.get(name) for row in rows], pa.float64()) for name in metrics
    }
    columns["curve"] = [json.dumps(row.curve) for row in rows]
    for stage in dict.fromkeys(stage for row in rows for stage in row.keys):
        columns[f"{stage}_key"] = pa.array([row.keys.get(stage) for row in rows], pa.string())
    columns["trial_seconds"] = [row.seconds for row in rows]
    return pa.table(columns)


def write_trials(path: UPath, rows: Sequence[Row], values: Sequence[Mapping[str, Any]]) -> None:
    """Write `trials_table` as Parquet."""
    write_table(path, trials_table(rows, values))


def _column(values: Sequence[Any]) -> pa.Array:
    """Return numbers or words as they are, and anything else (or a mixture) as JSON."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or kinds in ({str}, {bool}):
        numbers = pa.float64() if float in kinds else None
        return pa.array(values, numbers)
    return pa.array([None if value is None else json.dumps(value) for value in values])
