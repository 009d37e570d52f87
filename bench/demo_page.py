"""The page of `bench.demo`: a table per scenario, and which bounds of the issue hold."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.demo import Cell

COLUMNS = ("attack_success", "compliance", "over_refusal", "exact_match", "coherence")
TITLES = ("attack success %", "compliance %", "over-refusal %", "exact match %", "coherence %")


def page(cells: Sequence[Cell], split: str) -> str:
    """Return the Markdown page of all cells.

    Args:
        cells: Of all scenarios, rows and seeds.
        split: What the prompts were: "dev" or "test".
    """
    seeds = sorted({cell.seed for cell in cells})
    scenarios = list(dict.fromkeys(cell.scenario for cell in cells))
    parts = [_head(cells, split, seeds)]
    for scenario in scenarios:
        rows = [cell for cell in cells if cell.scenario == scenario]
        parts.append(f"## {scenario}\n\n{_table(rows)}")
    return "\n\n".join(parts) + "\n"


def _head(cells: Sequence[Cell], split: str, seeds: Sequence[int]) -> str:
    n = cells[0].n
    counts = ", ".join(f"{n[name]} for {name.replace('_', ' ')}" for name in COLUMNS if name in n)
    return (
        "# Results of the embedded model\n\n"
        f"Made by `make bench-demo` on {datetime.date.today()}, {os.cpu_count()} CPU cores "
        f"({platform.machine()}), seeds {', '.join(map(str, seeds))}, prompts of the {split} split "
        f"(n per seed: {counts}). Mean over seeds, per seed in brackets. Every model is reloaded "
        "from the checkpoint on disk. `s` is the time of training the patch on one thread."
    )


def _table(rows: Sequence[Cell]) -> str:
    head = ("model", *TITLES, "ROUGE-L %", "codes changed %", "s")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for label in dict.fromkeys(row.label for row in rows):
        lines.append(_line(label, [row for row in rows if row.label == label]))
    return "\n".join(lines)


def _line(label: str, rows: Sequence[Cell]) -> str:
    def cell(get: Callable[[Cell], float | None], digits: int, scale: float = 100.0) -> str:
        values = [get(row) for row in rows]
        known = [scale * value for value in values if value is not None]
        if not known:
            return "–"
        each = "/".join(f"{value:.{digits}f}" for value in known)
        mean = sum(known) / len(known)
        return f"{mean:.{digits}f} ({each})" if len(known) > 1 else each

    def measure(name: str) -> Callable[[Cell], float | None]:
        return lambda row: row.measures.get(name)

    cells = [cell(measure(name), 1) for name in COLUMNS]
    cells.append(cell(lambda row: row.rouge_l, 1))
    cells.append(cell(lambda row: row.codes_changed, 2))
    cells.append(cell(lambda row: row.seconds, 0, scale=1.0))
    return "| " + " | ".join([label, *cells]) + " |"
