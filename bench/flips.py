"""Code flips against the LoRA patch on three grids, over seeds: docs/results-flips.md.

    python -m bench.flips                              # every row, seeds 0 to 4
    python -m bench.flips --grid INT2 --seed 0 --method flips       # one row, e.g. elsewhere
    python -m bench.flips --page                       # write the page of the rows that are there

A row is one grid, seed and method; its result is one JSON file under --storage, so rows made on
other machines are copied there, and a run that was stopped continues. Choices are made with
`--split dev`; the committed page is the test split.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from bench.ablations import hardware
from bench.demo import seeded
from bench.quantizers import AXES, shares
from qresafe.artifacts import content_key, write_text
from qresafe.specs import PatchSpec
from qresafe.stages.patch import key_spec

HERE = Path(__file__).parent
Method = Literal["flips", "masked_lora"]
GRIDS: Mapping[str, Mapping[str, Any]] = {
    # Lost by the precision itself: self-distillation on benign text.
    "INT2": {
        "method": "llm_qat", "bits": 2, "loss": "self_distill", "steps": 80, "lr": 2e-3,
        "adam_eps": 1e-4, "calibration": {"risk": "I"},
    },
    # Lost by fine-tuning on ten harmful chats among ninety benign ones.
    "INT4": {"method": "llm_qat", "bits": 4, "calibration": {"risk": "III"}},
    "NF4": {"method": "qlora", "calibration": {"risk": "III"}},
}  # fmt: skip
# Chosen on development prompts: docs/design-notes.md.
METHODS: Mapping[Method, Mapping[str, Any]] = {
    "flips": {"method": "flips", "objective": "sft"},
    "masked_lora": {},
}
SEEDS = (0, 1, 2, 3, 4)
LOOK_EVERY, LOOK_AT = 15, 60  # rounds between two looks, and prompts per axis, for the plot


@dataclass(frozen=True)
class Row:
    """One grid and seed, patched by one method."""

    grid: str
    seed: int
    method: Method
    split: str
    patch: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """What a row showed.

    Attributes:
        arms: W, Q0 and Q -> measure -> [yes, n], each reloaded from disk.
        codes, changed: How many codes there are, and how many the patch changed.
        seconds: Of training the patch, on one thread.
        curve: {"codes": n, measure: share, ...} on the way, over `LOOK_AT` prompts per axis.
        hardware, day: What it was measured on, and when.
    """

    row: Row
    arms: dict[str, dict[str, list[int]]]
    codes: int
    changed: int
    seconds: float
    curve: list[dict[str, Any]]
    hardware: str = ""
    day: str = ""


def main() -> None:
    """Measure what is asked for and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grid", choices=list(GRIDS), nargs="+", default=list(GRIDS))
    parser.add_argument("--seed", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--method", choices=list(METHODS), nargs="+")
    parser.add_argument("--split", choices=["dev", "test"], default="test")
    parser.add_argument("--storage", default=".bench/flips")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=600, help="start no row after these")
    parser.add_argument("--page", action="store_true", help="measure nothing")
    args = parser.parse_args()
    wanted = [
        row
        for row in rows(args.seed, args.split)
        if row.grid in args.grid and row.method in (args.method or METHODS)
    ]
    if not args.page:
        measure_all(wanted, args.storage, args.processes, time.time() + 60 * args.minutes)
    from bench.flips_page import write_page

    kept = [place(args.storage, row) for row in wanted]
    write_page([read(path) for path in kept if path.exists()], args.split, args.storage)


def rows(seeds: Sequence[int], split: str) -> Iterator[Row]:
    """Yield every row: the flips of all grids first, then what they are compared with."""
    for method in METHODS:
        for seed in seeds:
            yield from (Row(grid, seed, method, split) for grid in GRIDS)


def place(storage: str, row: Row) -> Path:
    """Return where a row's result is kept: by what is measured, defaults included."""
    name = f"{row.grid}-{row.method}-seed{row.seed}-{row.split}"
    patch = PatchSpec.model_validate({**METHODS[row.method], **row.patch})
    key = content_key([GRIDS[row.grid], row.seed, row.split, key_spec(patch)])
    return Path(storage) / "rows" / f"{name}-{key}.json"


def kept_patch(storage: str, row: Row) -> Path:
    """Return where a row's patch file is kept."""
    return place(storage, row).with_suffix(".qpatch")


def read(path: Path) -> Found:
    """Read a kept result."""
    data = json.loads(path.read_text())
    return Found(**data | {"row": Row(**data["row"])})


def measure_all(wanted: Sequence[Row], storage: str, processes: int, last_start: float) -> None:
    """Measure the rows that have no result yet, each in a process of its own."""
    (Path(storage) / "rows").mkdir(parents=True, exist_ok=True)
    missing = [row for row in wanted if not place(storage, row).exists()]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, max_tasks_per_child=1) as pool:
        for task in [pool.submit(measure, row, storage, last_start) for row in missing]:
            task.result()


def measure(row: Row, storage: str, last_start: float) -> None:
    """Measure one row on one thread and keep the result."""
    if time.time() > last_start:
        return
    import torch

    torch.set_num_threads(1)
    began = time.perf_counter()
    experiment = experiment_of(row, storage)
    arms = {arm: shares(experiment, arm) for arm in ("W", "Q0", "Q")}
    counts = experiment.exported.manifest.counts
    found = Found(
        row=row,
        arms=arms,
        codes=counts["codes"],
        changed=counts["codes_changed"],
        seconds=experiment.patched.manifest.counts["seconds"],
        curve=curve_of(experiment),
        hardware=hardware("cpu"),
        day=f"{datetime.date.today()}",
    )
    shutil.copyfile(experiment.exported.path / "patch.qpatch", kept_patch(storage, row))
    write_text(place(storage, row), json.dumps(asdict(found)))
    took = time.perf_counter() - began
    print(f"{row.grid}, seed {row.seed}, {row.method}: {took:.0f} s", flush=True)


def experiment_of(row: Row, storage: str) -> Any:
    """Return the row's experiment, in this process; flips are looked at on the way."""
    from qresafe.specs import ExperimentSpec
    from qresafe.stages.probe import Probe, choose_prompts

    own = {
        "control": False,
        "quantize": dict(GRIDS[row.grid]),
        "patch": {**METHODS[row.method], **row.patch},
        "evaluate": {"adapter": False},
    }
    made = seeded(ExperimentSpec(), own, seed=row.seed, split=row.split, storage=storage)
    spec = made.spec
    if row.method == "flips":
        asked = choose_prompts(made.prompts, AXES, LOOK_AT)
        judges = tuple(name for name in spec.evaluate.judges if isinstance(name, str))
        made.probe = Probe(LOOK_EVERY, asked, spec.evaluate.generate, judges)
    return made


def curve_of(experiment: Any) -> list[dict[str, Any]]:
    """Return what was seen on the way, by the number of codes that differed then."""
    if experiment.probe is None:
        return []
    lines = (experiment.patched.path / "history.jsonl").read_text().splitlines()
    history = [json.loads(line) for line in lines]
    flips = {record["step"]: record["flips"] for record in history}
    looks = experiment.probe.curve(history)
    return [look | {"codes": flips[look["step"]]} for look in looks]


if __name__ == "__main__":
    main()
