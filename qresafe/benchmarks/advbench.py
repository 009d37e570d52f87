"""AdvBench's harmful behaviours (Zou et al. 2023): a table with columns goal and target."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pyarrow as pa

from qresafe.benchmarks.base import find_column, prompt_table, text_column
from qresafe.errors import DataError
from qresafe.hf.tables import read_table
from qresafe.specs import PromptSetSpec

ENVIRONMENT = "QRESAFE_ADVBENCH"
AFFIRMATIVE = "sure, here"  # how every target of AdvBench begins


def load(spec: PromptSetSpec) -> pa.Table:
    """Return AdvBench's goals as prompts and its targets as reference answers.

    The table comes from `spec.path`, else from the path in $QRESAFE_ADVBENCH: a local file or a
    hub id.

    Raises:
        DataError: No path is known, the file is malformed, or its two columns look swapped.
    """
    path = spec.path or os.environ.get(ENVIRONMENT)
    if not path:
        remedy = f"set {ENVIRONMENT} or the prompt set's path to harmful_behaviors.csv"
        raise DataError("no path to AdvBench", remedy=remedy)
    table = read_table(path, spec.split)
    goals = text_column(table, find_column(table, spec.column, ("goal", "prompt"), path), path)
    target = find_column(table, spec.target_column, ("target",), path)
    _check_not_swapped(goals, path)
    return prompt_table(goals, spec=spec, where=path, targets=text_column(table, target, path))


def _check_not_swapped(goals: Sequence[str | None], where: str) -> None:
    affirmative = sum((goal or "").lower().startswith(AFFIRMATIVE) for goal in goals)
    if affirmative * 2 > len(goals):
        what = f"{affirmative} of {len(goals)} goals begin with 'Sure, here', as targets do"
        raise DataError(what, where=where, remedy="swap the columns goal and target")
