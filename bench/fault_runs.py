"""What fault runs run: generate, patch and search on the embedded model, and what must come out."""

from __future__ import annotations

import collections
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

SMALL = {
    "control": False,
    "quantize": {"method": "rtn", "bits": 4, "group_size": 32},
    "patch.steps": 24,
    "patch.checkpoint_every": 2,
    "patch.zero_stage": 0,
    # A search validates on the dev split: what it holds back must be other prompts.
    "evaluate.prompts": [
        {"axis": axis, "split": "test", "limit": 12} for axis in ("harmful", "benign", "borderline")
    ],
    "evaluate.generate.batch_size": 4,
}
TRIALS = 5
SPACE = {
    "name": "faults",
    "base": "cpu-smoke",
    "space": {"patch.lr": {"loguniform": [1e-4, 1e-2]}, "patch.rank": {"choice": [4, 8]}},
    "budget": {"trials": TRIALS, "concurrent": 2},
    "probe": {"every": 6, "prompts": 4, "max_new_tokens": 6},
    "confirm": [],
}
# Time, and what quotes it.
TIMED = ("seconds", "trial_seconds")
WEIGHTS = ("adapter.safetensors", "masks.safetensors", "codes.safetensors", "delta.safetensors")
Rows = list[tuple[Any, Any]]  # what a row is called, and what it says


@dataclass(frozen=True)
class Workload:
    """One command, and how its result is read.

    Attributes:
        name: "generate", "patch" or "search".
        words: The command line after `qresafe`; {space} is the search's file.
        workers: Its Ray workers.
        rows: Reads the result as rows from the run's folder.
        targets: What its faults can hit: a name -> titles of processes.
        done: Where its result lies, below the run's folder.
    """

    name: str
    words: tuple[str, ...]
    workers: int
    rows: Callable[[Path], Rows]
    targets: Mapping[str, tuple[str, ...]]
    done: str


@dataclass(frozen=True)
class Difference:
    """What a result has other than the fault-free one: rows lost, doubled, other."""

    lost: int = 0
    doubled: int = 0
    changed: int = 0

    def __bool__(self) -> bool:
        return bool(self.lost or self.doubled or self.changed)


def completions(run: Path) -> Rows:
    """Return Q0's completions of the evaluation prompts by prompt and sample."""
    found: Rows = []
    for file in sorted(run.glob("generate/*/completions.parquet")):
        rows = pq.read_table(file).to_pylist()
        found += [((r["prompt_id"], r["sample"]), json.dumps(r, sort_keys=True)) for r in rows]
    return found


def training(run: Path) -> Rows:
    """Return a patch's steps, without their times, and the bytes of what it left."""
    found: Rows = []
    for file in sorted(run.glob("patch/*/history.jsonl")):
        for line in file.read_text().splitlines():
            record = {k: v for k, v in json.loads(line).items() if k not in TIMED}
            found.append((record["step"], json.dumps(record, sort_keys=True)))
        found += [(name, (file.parent / name).read_bytes()) for name in WEIGHTS]
    return found


def trials(run: Path) -> Rows:
    """Return a search's table of trials, without their times."""
    found: Rows = []
    for file in sorted(run.glob("search/*/trials.parquet")):
        for row in pq.read_table(file).to_pylist():
            kept = {k: v for k, v in row.items() if k not in TIMED}
            found.append((row["trial"], json.dumps(kept, sort_keys=True)))
    return found


GENERATE = Workload(
    "generate",
    ("generate", "cpu-smoke", "--arm", "Q0"),
    2,
    completions,
    {"actor": ("ray::Engine",)},
    "generate/*/completions.parquet",
)
PATCH = Workload(
    "patch",
    ("patch", "cpu-smoke"),
    2,
    training,
    {"training worker": ("ray::RayTrainWorker",)},
    "patch/*/history.jsonl",
)
SEARCH = Workload(
    "search",
    ("search", "{space}"),
    0,
    trials,
    {"actor": ("ray::ImplicitFunc",)},
    "search/*/trials.parquet",
)
WORKLOADS = {one.name: one for one in (GENERATE, PATCH, SEARCH)}


def command(workload: Workload, storage: Path) -> list[str]:
    """Return the command line that runs, or continues, a workload on a storage."""
    space = storage.parent / "space.yaml"
    space.write_text(yaml.safe_dump(SPACE | {"set": SMALL}))
    words = [word.format(space=space) for word in workload.words]
    sets = [] if workload.name == "search" else settings()
    options = ["--storage", str(storage), "--name", "faults", "--workers", str(workload.workers)]
    return [sys.executable, "-m", "qresafe.cli", *words, *sets, *options]


def settings() -> list[str]:
    """Return `SMALL` as options."""
    return [
        word for key, value in SMALL.items() for word in ("--set", f"{key}={json.dumps(value)}")
    ]


def prepare(folder: Path, environment: Mapping[str, str]) -> Path:
    """Make what the workloads have in common (Q0, pairs), without Ray and faults."""
    base = folder / "base"
    words = ["pairs", "cpu-smoke", *settings(), "--storage", str(base), "--name", "faults"]
    run = [sys.executable, "-m", "qresafe.cli", *words, "--workers", "0"]
    subprocess.run(run, env=dict(environment), check=True, capture_output=True)
    return base


def fresh(base: Path, storage: Path, workload: Workload) -> Path:
    """Give a run of its own the common stages; for generate without anything generated."""
    shutil.rmtree(storage, ignore_errors=True)
    shutil.copytree(base, storage)
    run = storage / "runs" / "faults"
    if workload is GENERATE:
        shutil.rmtree(run / "generate")
    return run


def difference(expected: Rows, found: Rows) -> Difference:
    """Compare rows by name: each of the expected ones exactly once, and saying the same."""
    names = collections.Counter(name for name, _ in found)
    wanted = dict(expected)
    return Difference(
        lost=sum(name not in names for name in wanted),
        doubled=sum(count - 1 for count in names.values()),
        changed=sum(wanted.get(name) != said for name, said in dict(found).items()),
    )
