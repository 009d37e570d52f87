"""Peak memory of importing, judging and comparing two files of completions, by their length.

    python -m bench.streaming                    # 1e4, 1e5, 1e6 rows
    python -m bench.streaming --rows 1000 5000   # others

Every step of every length runs in a process of its own; its peak resident memory is the kernel's.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROWS = (10_000, 100_000, 1_000_000)
STEPS = ("import", "judge", "compare")
ANSWERS = (
    "I'm sorry, but I can't help with that request, because it could hurt somebody.",
    "Sure, here is a guide. Step one: gather what you need. Step two: begin slowly and with care.",
    "I cannot assist with that because it is illegal. Is there anything else that I can do?",
)
AXES = ("harmful", "borderline", "benign")


def main() -> None:
    """Measure what is asked for, or do one step of it in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps(one_step(args.step, args.folder)))
        return
    for line in table([found for rows in args.rows for found in measure(rows)]):
        print(line)


def measure(rows: int) -> list[dict[str, Any]]:
    """Return each step's peak memory (MiB) and seconds for two files of `rows` completions."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for place, label in enumerate("ab"):
            write_completions(folder / f"{label}.jsonl", rows, shift=place)
        return [{"rows": rows, **_in_process(step, folder)} for step in STEPS]


def write_completions(path: Path, rows: int, shift: int) -> None:
    """Write completions, each to a prompt of its own; a twentieth differs between shifts."""
    with path.open("w") as file:
        for i in range(rows):
            answer = ANSWERS[(i + shift * (i % 20 == 0)) % len(ANSWERS)]
            row = {"prompt": f"request {i}", "completion": f"{answer} ({i})", "axis": AXES[i % 3]}
            file.write(json.dumps(row) + "\n")


def one_step(step: str, folder: Path) -> dict[str, Any]:
    """Do one step, what lies before it being finished; return its seconds and peak memory."""
    from qresafe.artifacts import Run
    from qresafe.progress import Silent
    from qresafe.stages.compare import compare
    from qresafe.stages.imported import completions_of
    from qresafe.stages.judge import judge

    began = time.perf_counter()
    run, judges = Run(str(folder), "streaming"), ["keyword", "refusal"]
    arms: dict[str, Any] = {}
    for label in "ab":
        made = completions_of(run, folder / f"{label}.jsonl")
        if step != "import":
            arms[label] = made, judge(run, made, judges, Silent())
    if step == "compare":
        compare(run, arms, Silent())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"step": step, "mib": round(peak, 1), "seconds": round(time.perf_counter() - began, 1)}


def table(found: list[dict[str, Any]]) -> list[str]:
    """Return the measurements as a Markdown table, memory also against the shortest files'."""
    base = {row["step"]: row["mib"] for row in reversed(found) if row["rows"] == found[0]["rows"]}
    lines = ["| rows per file | step | peak memory, MiB | against the first | seconds |"]
    lines.append("|---|---|---|---|---|")
    for row in found:
        ratio = row["mib"] / base[row["step"]]
        lines.append(
            f"| {row['rows']:,} | {row['step']} | {row['mib']:.0f} | {ratio:.2f} "
            f"| {row['seconds']:.1f} |"
        )
    return lines


def _in_process(step: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.streaming", "--step", step, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
