"""The memory model of `qresafe plan` against what real stages take, on small random models.

Each case is a stage in a process of its own, on one thread. What is measured is the most that
torch's allocator had given out at a time (on a GPU: `max_memory_allocated`), which is what the
model predicts; the resident memory of the process is not, for it holds Python and its libraries.

    python -m bench.plan                             # prints the table
    python -m bench.plan --out docs/plan-measured.md # and writes it
    python -m bench.plan --device cuda               # the same cases on a GPU
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.plan_cases import CASES, SHAPES, predicted
from qresafe.planning.memory import total

MIB = 1 << 20
AIM = 0.15


def measured(case: dict[str, Any], device: str) -> float:
    """Return the peak of a case in bytes, from a child process."""
    given = json.dumps(case | {"shape": SHAPES[case["shape"]]})
    command = [sys.executable, "-m", "bench.plan_case", given, device]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{case} failed: {ended.stderr[-2000:]}")
    return float(json.loads(ended.stdout)["peak"])


def row(name: str, device: str) -> tuple[str, float]:
    """Return a case's line of the table and its relative error."""
    case = CASES[name]
    real, parts = measured(case, device), predicted(case, device)
    said = total(parts)
    largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
    shown = ", ".join(f"{part} {size / MIB:.0f}" for part, size in largest)
    error = said / real - 1
    line = f"| {name} | {real / MIB:.0f} | {said / MIB:.0f} | {error:+.1%} | {shown} |"
    return line, error


def page(device: str) -> str:
    """Measure all cases and return the Markdown page."""
    rows = []
    for name in CASES:
        rows.append(row(name, device))
        print(rows[-1][0], file=sys.stderr, flush=True)
    errors = [abs(error) for _, error in rows]
    inside = sum(error <= AIM for error in errors)
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("torch", "transformers"))
    where = f"CPU ({platform.machine()})" if device == "cpu" else device_name()
    return "\n".join(
        [
            "# The memory model against measurements",
            "",
            f"Made by `make bench-plan` on {datetime.date.today()}, {where}; {versions}. "
            f"Small random Llamas; MiB that torch's allocator held at the peak. {inside} of "
            f"{len(errors)} cases are within {AIM:.0%}, the largest error is {max(errors):.1%}. "
            "[What this shows and what it does not](plan.md).",
            "",
            "| case | measured | predicted | error | largest parts predicted |",
            "|---|---:|---:|---:|---|",
            *(line for line, _ in rows),
            "",
        ]
    )


def device_name() -> str:
    """Return the GPU's name."""
    import torch

    return str(torch.cuda.get_device_name())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    text = page(options.device)
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
