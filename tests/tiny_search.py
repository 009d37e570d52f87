"""Real searches on a tiny random model, and what of their tables must not depend on time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from qresafe.dist.search import run_search
from qresafe.progress import Silent
from qresafe.search_spec import Search, load_search
from qresafe.stages.search.check import check_search
from qresafe.stages.search.folder import TRIALS

AXES = ("harmful", "benign", "borderline")
# Spent time, and the stages that hold it in their names or hashes.
TIMED = ("trial_seconds", "seconds")


def write_space(folder: Path, model: Path, **changes: Any) -> Path:
    """Write a search of a tiny random model: 12 steps, four prompts an axis, no confirmation."""
    prompts = [{"axis": axis, "split": "test", "limit": 4} for axis in AXES]
    base = {
        "storage": str(folder / "store"),
        "model.path": str(model),
        "control": False,
        "quantize": {"method": "rtn", "bits": 4, "group_size": 32},
        "pairs": {"harmful": 6, "benign": 6, "borderline": 4, "recombined": 4,
                  "max_new_tokens": 6, "keep": "different"},
        "evaluate.prompts": prompts,
        "evaluate.generate": {"max_new_tokens": 6},
        "patch.steps": 12,
        "patch.batch_size": 8,
        "patch.micro_batch_size": 8,
        "patch.rank": 4,
        "patch.checkpoint_every": 1,
        "patch.mask.samples": 4,
        "patch.mask.remask_every": 5,
        "resources.workers": 0,
    }  # fmt: skip
    data = {
        "name": "tiny",
        "base": "demo",
        "set": base,
        "space": {
            "patch.mask.tau": {"uniform": [0.1, 1.0]},
            "patch.lr": {"loguniform": [1e-4, 1e-2]},
        },
        "budget": {"trials": 6, "concurrent": 2},
        "probe": {"every": 4, "prompts": 4, "max_new_tokens": 6},
        "confirm": [],
    }
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(data | changes))))
    return path


def searched(path: Path) -> tuple[Search, pa.Table]:
    search = load_search(path)
    check_search(search)
    folder = run_search(search, Silent())
    return search, pq.read_table(str(folder / TRIALS))


def untimed(table: pa.Table) -> list[dict[str, Any]]:
    return table.drop_columns([name for name in TIMED if name in table.column_names]).to_pylist()


def start(path: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "qresafe.cli", "search", str(path), *more]
    with open(path.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
