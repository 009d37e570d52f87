"""All speed comparisons of this machine in one table: patch step, SNIP, generation, Ray.

Every figure is a ratio to a peer that ran in the same command on the same machine; the benches
beside this file say how.

    python -m bench.speed            # about six minutes on two quiet cores; docs/results-speed.md
    python -m bench.speed --quick    # tiny shapes, to try the code; prints, writes nothing
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import generation, patch_step, snip

RESULTS = Path(__file__).parents[1] / "docs" / "results-speed.md"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: Ours, against which peer.
        ratio: Ours divided by the peer's.
        target: The bound that the issue asks for.
        at_least: Whether the ratio should reach the target, or stay below it.
        detail: What was measured, in words and units.
        command: Makes this figure alone.
    """

    what: str
    ratio: float
    target: float
    at_least: bool
    detail: str
    command: str

    @property
    def met(self) -> bool:
        """Whether the measured ratio meets the target."""
        return self.ratio >= self.target if self.at_least else self.ratio <= self.target


def patch_rows(quick: bool) -> list[Row]:
    """Return the patch step of both mask kinds against TRL with a PEFT adapter."""
    small: dict[str, int] = {"steps": 1, "rows": 2, "rank": 4, "hidden": 64, "layers": 1}
    found = patch_step.measure(**small if quick else {"steps": 4})
    names = {"factors": "mask `factors`", "weight": "mask `weight`, through the grid"}
    return [
        Row(
            f"Patch step, {name}, tokens/s against TRL `DPOTrainer` + PEFT LoRA",
            found["ratio"][kind],
            patch_step.TARGETS[kind],
            True,
            f"{found['tokens_per_second'][kind]:,.0f} against "
            f"{found['tokens_per_second']['trl']:,.0f} tokens/s ({found['clock']}, "
            f"{found['threads']} threads, {_millions(found)})",
            "python -m bench.patch_step",
        )
        for kind, name in names.items()
    ]


def snip_rows(quick: bool) -> list[Row]:
    """Return SNIP's time and memory."""
    small = {"hidden": 64, "layers": 1, "vocabulary": 512, "pairs": 4, "rows": 2, "repeats": 1}
    found = snip.measure(**small if quick else {})
    times, command = found["seconds"], "python -m bench.snip"
    return [
        Row(
            "SNIP, time against a forward+backward pass with weight gradients",
            found["ratio"],
            found["ratio_bound"],
            False,
            f"{times['snip']:.2f} s against {times['peer']:.2f} s ({found['tokens']:,} tokens, "
            f"{found['threads']} threads, {_millions(found)})",
            command,
        ),
        Row(
            "SNIP, peak memory above the model against 3 × the largest gradient + 1 bit a weight",
            found["peak_bytes"] / found["peak_bound"],
            1.0,
            False,
            f"{found['peak_bytes'] / 1e6:.1f} MB against {found['peak_bound'] / 1e6:.1f} MB, and "
            f"{found['file_bytes'] / 1e6:.0f} MB in files",
            command,
        ),
    ]


def generation_rows(quick: bool) -> list[Row]:
    """Return generation against transformers' pipeline, for both kinds of answers."""
    load = generation.Load(threads=os.cpu_count() or 1)
    if quick:
        load = generation.Load(prompts=6, shortest=4, longest=16, new_tokens=8, batch_size=2)
    found = generation.against_pipeline(_shape(quick), load)
    cases = {"mixed": "answers that end by themselves", "to the limit": "answers up to the limit"}
    return [
        Row(
            f"Generation, tokens/s against `pipeline`, mixed-length prompts, {what}",
            found[case]["ratio"],
            1.5,
            True,
            f"{found[case]['tokens_per_second']['ours']:,.0f} against "
            f"{found[case]['tokens_per_second']['pipeline']:,.0f} tokens/s "
            f"({found[case]['clock']}, {load.prompts} prompts "
            f"of {load.shortest} to {load.longest} tokens, batches of {load.batch_size}, "
            f"{load.threads} threads, {_millions(found)}; equal answers: "
            f"{found[case]['equal_answers']})",
            "python -m bench.generation --only pipeline",
        )
        for case, what in cases.items()
    ]


def ray_rows(quick: bool) -> list[Row]:
    """Return what Ray Data adds to a job of about a minute."""
    load = generation.Load()
    if quick:
        load = generation.Load(shortest=4, longest=16, new_tokens=8, batch_size=2)
    found = generation.ray_overhead(_shape(quick), load, 0.1 if quick else 64.0)
    times = found["seconds"]
    return [
        Row(
            "Generate stage on Ray Data against the same stage in this process, wall time",
            found["ratio"],
            1.15,
            False,
            f"{times['ray']:.1f} s against {times['in_process']:.1f} s ({found['prompts']} "
            f"prompts, one worker, {load.threads} threads; the session's start, "
            f"{found['session_seconds']:.1f} s once per experiment, is not in it)",
            "python -m bench.generation --only ray",
        )
    ]


def _shape(quick: bool) -> generation.Shape:
    return generation.Shape(64, 1, 2, 128) if quick else generation.Shape()


def _millions(found: dict[str, Any]) -> str:
    return f"{found['parameters'] / 1e6:.1f} M parameters"


PARTS: dict[str, Callable[[bool], list[Row]]] = {
    "patch": patch_rows,
    "snip": snip_rows,
    "generation": generation_rows,
    "ray": ray_rows,
}


def render(rows: list[Row], command: str) -> str:
    """Return the Markdown page.

    Args:
        rows: All that was measured.
        command: What made the page.
    """
    lines = [
        "# Speed",
        "",
        f"Made by `{command}` on {datetime.date.today()}: {os.cpu_count()} cores "
        f"({platform.machine()}), load {os.getloadavg()[0]:.1f} at the end, "
        f"torch {torch.__version__}. Both sides of a ratio ran in the same command.",
        "",
        "| what | ratio | target | met | measured | command |",
        "|---|---:|---:|---|---|---|",
    ]
    for row in rows:
        sign, met = ("≥" if row.at_least else "≤"), ("yes" if row.met else "**no**")
        target = f"{sign} {row.target:g}"
        cells = [row.what, f"{row.ratio:.2f}", target, met, row.detail, f"`{row.command}`"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, and write it where nothing was made small or left out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes; writes nothing")
    parser.add_argument("--only", choices=list(PARTS), help="one part; writes nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(os.cpu_count() or 1)
    parts = [options.only] if options.only else list(PARTS)
    page = render([row for part in parts for row in PARTS[part](options.quick)], _command(options))
    print(page)
    if options.quick:
        print("Tiny shapes: these ratios show that the code runs, and nothing else.")
    if not options.quick and not options.only:
        RESULTS.write_text(page)


def _command(options: argparse.Namespace) -> str:
    chosen = f" --only {options.only}" if options.only else ""
    return f"python -m bench.speed{' --quick' if options.quick else ''}{chosen}"


if __name__ == "__main__":
    main()
