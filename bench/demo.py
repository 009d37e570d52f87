"""The embedded model's results over seeds: scenarios, controls and ablations (bench/demo.yaml).

    python -m bench.demo                  # every row, seeds 0 1 2: writes docs/results-demo.md
    python -m bench.demo --split dev --only "risk III"

Everything runs in this process; finished stages are reused, so an interrupted run continues.
Choices are made with `--split dev`; the committed table is the test split, looked at once.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qresafe.loading import merged, read_yaml

if TYPE_CHECKING:
    from qresafe.specs import ExperimentSpec

HERE = Path(__file__).parent
AXES = ("harmful", "benign", "borderline")


@dataclass(frozen=True)
class Cell:
    """One model's figures with one seed; shares in [0, 1]."""

    scenario: str
    label: str
    seed: int
    n: dict[str, int]
    measures: dict[str, float | None]
    rouge_l: float | None
    codes_changed: float | None
    patch_bytes_per_code: float | None
    seconds: float | None  # of training the patch


@dataclass(frozen=True)
class Row:
    """One row of one table with one seed: which experiment, and which of its arms."""

    scenario: str
    label: str
    arm: str
    preset: str
    settings: dict[str, Any]
    seed: int


def main() -> None:
    """Measure what is asked for and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", choices=["dev", "test"], default="test")
    parser.add_argument("--only", nargs="*", help="scenarios, and 'rounding'")
    parser.add_argument("--storage", default=".bench")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=600, help="start no row after these")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "results-demo.md")
    args = parser.parse_args()
    last_start = time.time() + 60 * args.minutes
    with ProcessPoolExecutor(args.processes) as pool:
        tasks = [
            pool.submit(measure_rows, rows, args.split, args.storage, last_start)
            for rows in batches(args.only, args.seeds)
        ]
        cells = [cell for task in tasks for cell in task.result()]
    from bench.demo_page import page

    text = page(cells, args.split)
    print(text)
    lines = [json.dumps(asdict(cell)) for cell in cells]
    Path(args.storage, f"cells-{args.split}.jsonl").write_text("\n".join(lines) + "\n")
    if args.split == "test":
        args.out.write_text(text)


def batches(only: Sequence[str] | None, seeds: Sequence[int]) -> list[list[Row]]:
    """Return the rows in the order of their weight: what others build on, then each variant.

    The rows of a batch share stages, so one process measures them one after the other.
    """
    plan = read_yaml((HERE / "demo.yaml").read_text())
    wanted = only or [*plan["scenarios"], "rounding"]
    found: list[list[Row]] = []
    for part, scenario in plan["scenarios"].items():
        base = scenario.get("set", {})
        first = scenario.get("arms", ("W", "control", "Q0", "Q"))
        arms = [(part, arm, arm, scenario["preset"], base) for arm in first]
        found += [[Row(*arm, seed) for arm in arms] for seed in seeds if part in wanted]
    if "rounding" in wanted:
        rounded = [("rounding", row["label"], "Q0", "demo", row) for row in plan["rounding"]]
        found += [[Row(*row, seed) for row in rounded] for seed in seeds]
    for variant in plan["variants"]:
        part = variant["scenario"]
        scenario = plan["scenarios"][part]
        settings = merged(scenario.get("set", {}), {"patch": variant.get("set", {})})
        row = (part, variant["label"], variant.get("arm", "Q"), scenario["preset"], settings)
        found += [[Row(*row, seed)] for seed in seeds if part in wanted]
    return found


def measure_rows(rows: Sequence[Row], split: str, storage: str, last_start: float) -> list[Cell]:
    """Measure rows that share stages, on one thread; none is started after `last_start`."""
    import torch

    torch.set_num_threads(1)
    cells = []
    for row in rows:
        if time.time() < last_start:
            experiment = experiment_of(row, split, storage)
            cells.append(measure(experiment, row.scenario, row.label, row.arm))
    return cells


def experiment_of(row: Row, split: str, storage: str, device: str = "cpu") -> Any:
    """Return a row's experiment, in this process on `device`, one run per seed."""
    from qresafe.presets import load_experiment

    given = {key: value for key, value in row.settings.items() if key != "label"}
    base = load_experiment(row.preset)
    return seeded(base, given, seed=row.seed, split=split, storage=storage, device=device)


def seeded(
    base: ExperimentSpec,
    changes: Mapping[str, Any],
    *,
    seed: int,
    split: str,
    storage: str,
    device: str = "cpu",
) -> Any:
    """Return an experiment on the embedded prompts, in this process, one run per seed.

    Args:
        base: What it is made from.
        changes: Nested like the spec.
        seed: Of all stages, and in the run's name.
        split: Of the prompts, "dev" or "test".
        storage: Where runs go.
        device: A torch device.
    """
    from qresafe.stages.experiment import Experiment
    from qresafe.stages.runtime import InProcessRuntime
    from qresafe.stages.seeds import with_seed
    from qresafe.variants import with_changes

    own = {
        "name": f"seed{seed}",
        "storage": storage,
        "evaluate": {"prompts": [{"axis": axis, "split": split} for axis in AXES]},
        "resources": {"workers": 0},
    }
    spec = with_changes(base, merged(own, changes))
    return Experiment(with_seed(spec, seed), InProcessRuntime(device))


def measure(experiment: Any, scenario: str, label: str, arm: str) -> Cell:
    """Measure one arm of an experiment, as reloaded from disk."""
    from qresafe.stages.compare import compare, read_comparison

    judged = experiment.completions(arm), experiment.verdicts(arm)
    found = read_comparison(compare(experiment.run, {arm: judged}, experiment.progress, []))
    result = found.arms[0]
    patched = arm in ("Q", "adapter")
    exported = experiment.exported.manifest.counts if patched else {}
    print(f"seed {experiment.spec.patch.seed}: {scenario}, {label}", flush=True)
    return Cell(
        scenario=scenario,
        label=label,
        seed=experiment.spec.patch.seed,
        n={name: share.n for name, share in result.measures.items()},
        measures={name: share.share for name, share in result.measures.items()},
        rouge_l=result.utility.rouge_l if result.utility else None,
        codes_changed=exported.get("fraction_changed") if arm == "Q" else None,
        patch_bytes_per_code=exported.get("bytes_per_changed_code") if arm == "Q" else None,
        seconds=experiment.patched.manifest.counts["seconds"] if patched else None,
    )


if __name__ == "__main__":
    main()
