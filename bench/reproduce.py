"""The paper's tables on the embedded model, many rows at once: docs/reproduce/.

    python -m bench.reproduce                      # every table, seed 0
    python -m bench.reproduce --only table5 --seeds 0 1 2
    python -m bench.reproduce --rows docs/reproduce/rows.jsonl --seeds 0 1 2
                                                   # only what that file lacks
    python -m bench.reproduce --page               # the pages of the rows that are there

`qresafe reproduce all --preset embedded` measures the same rows one after the other. Here each
runs in a process of its own, equal rows of several tables once, and its figures are kept, in the
storage and, beside the pages, in rows.jsonl: a row on each line with its day and machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

from bench.ablations import hardware
from bench.kept import between, take, write_rows
from bench.processes import in_processes
from qresafe.artifacts import content_key, write_text
from qresafe.progress import Silent
from qresafe.stages.arms import W
from qresafe.stages.experiment import CALIBRATION, EVALUATION
from qresafe.stages.reproduce.filled import FilledRow, experiment_of, filled, run_name
from qresafe.stages.reproduce.page import page
from qresafe.stages.reproduce.plan import PlannedArm, planned
from qresafe.stages.reproduce.tables import paper_table, preset, table_names
from qresafe.stages.runtime import InProcessRuntime

PRESET = "embedded"
PAGES = Path(__file__).parents[1] / "docs" / "reproduce"
ROWS = "rows.jsonl"


@dataclass(frozen=True)
class Task:
    """One row of a table with one seed."""

    table: str
    arm: PlannedArm
    seed: int

    @property
    def key(self) -> str:
        """The same for equal rows of two tables."""
        spec = self.arm.spec.key_data({"storage"}) if self.arm.spec else ""
        return content_key([spec, self.arm.arm.quantizer, list(self.arm.cells), self.seed])

    @property
    def quantized(self) -> str:
        """The same for rows that share their Q0."""
        spec = self.arm.spec
        return content_key([spec.quantize.key_data() if spec else None, self.seed])


@dataclass(frozen=True)
class Place:
    """Where and until when rows are measured, and whether their hours mean anything."""

    storage: str
    device: str
    last_start: float
    timed: bool = True


def main() -> None:
    """Measure what is asked for and write the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="*", default=list(table_names()), help="tables")
    parser.add_argument("--quantizers", nargs="*", default=[""], help="e.g. AQLM, or AQLM INT4")
    parser.add_argument("--storage", default=".bench/reproduce")
    parser.add_argument("--rows", type=Path, help=f"take a {ROWS}'s as measured")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=600, help="start no row after these")
    parser.add_argument("--untimed", action="store_true", help="no hours: other work runs here")
    parser.add_argument("--page", action="store_true", help="write the pages of what is there")
    args = parser.parse_args()
    (Path(args.storage) / "rows").mkdir(parents=True, exist_ok=True)
    if args.rows:
        take(args.rows, args.storage)
    wanted = tasks(args.only, args.seeds, args.storage)
    if not args.page:
        last_start = time.time() + 60 * args.minutes
        place = Place(args.storage, args.device, last_start, timed=not args.untimed)
        begins = tuple(args.quantizers)
        chosen = [task for task in wanted if task.arm.arm.quantizer.startswith(begins)]
        measure_all(chosen, place, args.processes)
    write_pages(wanted, args.storage)


def tasks(tables: Iterable[str], seeds: Iterable[int], storage: str) -> list[Task]:
    """Return the rows of some tables, seed by seed."""
    overrides = [f"storage={storage}"]
    plans = {name: planned(paper_table(name), preset(PRESET), overrides) for name in tables}
    return [Task(name, arm, seed) for seed in seeds for name, arms in plans.items() for arm in arms]


def measure_all(wanted: Sequence[Task], place: Place, processes: int) -> None:
    """Measure what is missing: first what all rows share, then each Q0, then the other rows."""
    by_key = {task.key: task for task in wanted if not kept_at(place, task).exists()}
    by_q0: dict[str, list[Task]] = {}
    # Additive codebooks take ten times as long as everything else: last.
    for task in sorted(by_key.values(), key=lambda task: task.arm.arm.quantizer.startswith("AQLM")):
        by_q0.setdefault(task.quantized, []).append(task)
    work = partial(measure, place=place)
    in_processes(partial(measure_shared, place=place), shared(by_key.values()), processes)
    in_processes(work, [tasks[0] for tasks in by_q0.values()], processes)
    in_processes(work, [one for tasks in by_q0.values() for one in tasks[1:]], processes)


def shared(rows: Iterable[Task]) -> list[tuple[str, Task]]:
    """Return what rows of the same seed share of W, each once: answers and attacks on it."""
    found: dict[str, tuple[str, Task]] = {}
    for task in rows:
        if not task.arm.spec:
            continue
        asked = task.arm.spec.evaluate
        found.setdefault(f"{CALIBRATION} {task.seed}", (CALIBRATION, task))
        found.setdefault(f"{asked.generate} {task.seed}", (EVALUATION, task))
        if asked.attack:
            found.setdefault(f"{asked.attack} {task.seed}", ("attack", task))
    return list(found.values())


def measure_shared(what: tuple[str, Task], place: Place) -> None:
    """Make one thing that rows of a seed share of W."""
    kind, task = what
    assert task.arm.spec is not None
    runtime, name = InProcessRuntime(place.device), run_name(PRESET, task.seed)
    experiment = experiment_of(task.arm.spec, task.seed, name, runtime, Silent())
    if kind == CALIBRATION:
        experiment.completions(W, CALIBRATION)
    elif kind == EVALUATION:
        experiment.verdicts(W)
    else:
        experiment.attacked(W)


def measure(task: Task, place: Place) -> None:
    """Measure one row and keep its figures; a refusal is a result too."""
    path = kept_at(place, task)
    if path.exists() or time.time() > place.last_start:
        return
    began = time.perf_counter()
    runtime = InProcessRuntime(place.device)
    name = run_name(PRESET, task.seed)
    try:
        (row,) = filled([task.arm], task.seed, name, runtime, Silent())
    except Exception:  # a defect in one row should not cost the others
        traceback.print_exc()
        return
    today = date.today().isoformat()
    on = [hardware(place.device)]
    figures = {cell: one for cell, one in row.figures.items() if place.timed or cell != "hours"}
    row = row.model_copy(update={"figures": figures})
    kept = {"row": row.model_dump(), "hardware": on, "between": [today, today]}
    write_text(path, json.dumps(kept))
    outcome = row.refused or f"{time.perf_counter() - began:.0f} s"
    print(f"seed {task.seed}: {task.table}, {row.title}: {outcome}", flush=True)


def kept_at(place: Place, task: Task) -> Path:
    """Return where a row's figures are kept."""
    return Path(place.storage) / "rows" / f"{task.key}.json"


def write_pages(wanted: Sequence[Task], storage: str, pages: Path = PAGES) -> None:
    """Write a page for each table with the rows that are there, and the rows."""
    pages.mkdir(exist_ok=True)
    place = Place(storage, "", 0.0)
    for name, group in itertools.groupby(sorted(wanted, key=lambda t: t.table), lambda t: t.table):
        of_table = list(group)
        found = [(task, json.loads(kept_at(place, task).read_text()))
                 for task in of_table if kept_at(place, task).exists()]  # fmt: skip
        if not found:
            continue
        rows = [FilledRow(**kept["row"] | {"title": task.arm.arm.title}) for task, kept in found]
        machines = ", ".join(dict.fromkeys(one for _, kept in found for one in kept["hardware"]))
        write_rows({task.key: kept for task, kept in found}, pages / ROWS)
        when = between(day for _, kept in found for day in kept["between"])
        seeds = sorted({row.seed for row in rows})
        asked = [task for task in of_table if task.seed in seeds]
        about = (
            f"Made by `python -m bench.reproduce --only {name} "
            f"--seeds {' '.join(map(str, seeds))}`, measured {when}; {machines}; "
            f"{len(found)} of {len(asked)} rows, one for each seed.{_timed(rows, seeds)}"
        )
        arms = list(dict.fromkeys(id(t.arm) for t in of_table))
        by_id = {id(task.arm): task.arm for task in of_table}
        text = page(paper_table(name), [by_id[i] for i in arms], rows, preset(PRESET), about)
        # A refusal names a file of the machine that it happened on.
        (pages / f"{name}.md").write_text(text.replace(storage, "STORAGE"))
        print(f"wrote {pages / name}.md: {len(found)} of {len(of_table)} rows")


def _timed(rows: Sequence[FilledRow], seeds: Sequence[int]) -> str:
    """Say whose hours a page shows, where these are not all rows'."""
    timed = sorted({row.seed for row in rows if "hours" in row.figures})
    if not timed or timed == seeds:
        return ""
    return f" Hours are those of seed {', '.join(map(str, timed))}; other work ran beside the rest."


if __name__ == "__main__":
    main()
