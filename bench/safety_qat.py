"""Safety inside LLM-QAT's own loss, against the patch made afterwards (open question 1).

    python -m bench.safety_qat --split dev

Embedded model, risk III, INT4: plain LLM-QAT, LLM-QAT with safety terms (as given below), and plain
LLM-QAT with the default patch, each measured as deployed. A finished stage is reused, so only the
first call's seconds are those of the work.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from bench.demo import Cell, Row, experiment_of, measure

ROWS: dict[str, tuple[str, dict[str, Any]]] = {  # label -> arm, quantize.safety
    "W": ("W", {}),
    "plain fine-tuning, full precision": ("control", {}),
    "plain LLM-QAT": ("Q0", {}),
    "safety-in-mind, default": ("Q0", {"safety": {}}),
    "safety-in-mind, anchor only": ("Q0", {"safety": {"dpo": 0}}),
    "plain LLM-QAT and the patch": ("Q", {}),
}
COLUMNS = ("attack_success", "over_refusal", "exact_match")


def main() -> None:
    """Measure the rows and print them as a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--split", choices=["dev", "test"], default="dev")
    parser.add_argument("--storage", default=".bench/safety-qat")
    args = parser.parse_args()
    print("| seed | row | " + " | ".join(COLUMNS) + " | s |", "|---|---|---|---|---|---|", sep="\n")
    for seed in args.seeds:
        for label, (arm, quantize) in ROWS.items():
            began = time.perf_counter()
            row = Row("risk III", label, arm, "demo", {"quantize": quantize}, seed)
            experiment = experiment_of(row, args.split, args.storage)
            made(experiment, arm)
            spent = time.perf_counter() - began
            print(line(measure(experiment, row.scenario, label, arm), spent), flush=True)


def made(experiment: Any, arm: str) -> None:
    """Make a row's model, without measuring it."""
    experiment.model(arm)


def line(cell: Cell, seconds: float) -> str:
    """Return a row of the table; shares in per cent."""
    shares = (f"{100 * (cell.measures[name] or 0):.1f}" for name in COLUMNS)
    return f"| {cell.seed} | {cell.label} | " + " | ".join(shares) + f" | {seconds:.0f} |"


if __name__ == "__main__":
    main()
