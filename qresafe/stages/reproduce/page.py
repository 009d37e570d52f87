"""A filled table as a page: the paper's value, ours with its interval, and the difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qresafe.stages.reproduce.filled import FilledRow
from qresafe.stages.reproduce.measure import MT_BENCH
from qresafe.stages.reproduce.plan import PlannedArm
from qresafe.stages.reproduce.tables import PaperTable, ReproducePreset
from qresafe.stages.statistics import wilson

LEGEND = (
    "Shares are in %: ours [95 % Wilson interval of all seeds' answers] (seed by seed) · the "
    "paper's (ours less the paper's). A dash: not measured."
)
NUMBERS = ("hours", MT_BENCH)  # cells that are no share


@dataclass(frozen=True)
class Compared:
    """One cell: ours and the paper's, in % for shares.

    Attributes:
        ours: The mean over seeds; None: not measured.
        paper: The paper's value; None: it has none.
        by_seed: Ours, seed by seed.
        interval: Wilson's, of the answers of all seeds together; None: not sampled.
    """

    ours: float | None
    paper: float | None
    by_seed: tuple[float, ...] = ()
    interval: tuple[float, float] | None = None


def compared(cell: str, arm: PlannedArm, rows: Sequence[FilledRow], model: str) -> Compared:
    """Put the paper's value of a cell beside ours.

    Args:
        cell: One of the table's cells.
        arm: Its row.
        rows: The row's figures, one for each seed.
        model: The paper's model.
    """
    paper = arm.arm.paper.get(model, {}).get(cell)
    found = [row.figures[cell] for row in rows if cell in row.figures]
    if not found:
        return Compared(None, paper)
    scale = 1.0 if cell.endswith(NUMBERS) else 100.0
    by_seed = tuple(scale * value for value, _ in found)
    mean, total = sum(by_seed) / len(by_seed), sum(n for _, n in found)
    if not total:
        return Compared(mean, paper, by_seed)
    bounds = wilson(round(sum(value * n for value, n in found)), total)
    return Compared(mean, paper, by_seed, (scale * bounds.low, scale * bounds.high))


def cell_text(one: Compared, comparable: bool = True) -> str:
    """Return a cell as a person reads it: ours [interval] (seed/seed), the paper's, difference."""
    ours = "–" if one.ours is None else f"{one.ours:.3g}" if one.interval is None else _share(one)
    if one.paper is None:
        return ours
    if one.ours is None:
        return f"– · paper {one.paper:g}"
    difference = f" ({one.ours - one.paper:+.1f})" if comparable else ""
    return f"{ours} · paper {one.paper:g}{difference}"


def _share(one: Compared) -> str:
    assert one.interval is not None
    low, high = one.interval
    seeds = "/".join(f"{value:.1f}" for value in one.by_seed)
    spread = f" ({seeds})" if len(one.by_seed) > 1 else ""
    return f"{one.ours:.1f} [{low:.1f}, {high:.1f}]{spread}"


def page(
    table: PaperTable,
    arms: Sequence[PlannedArm],
    rows: Sequence[FilledRow],
    preset: ReproducePreset,
    about: str,
) -> str:
    """Return the page of a filled table, in Markdown.

    Args:
        table: The table.
        arms: Its rows, planned.
        rows: Their figures, all seeds.
        preset: What it was answered with.
        about: The command, date and machine.
    """
    header = ["", *(_title(cell) for cell in table.cells)]
    lines = [f"## {table.title}", "", f"{table.asks} {about}", "", LEGEND, ""]
    lines += [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    refused = []
    for arm in arms:
        own = [row for row in rows if row.title == arm.arm.title]
        refused += [f"- {row.title}, seed {row.seed}: {row.refused}" for row in own if row.refused]
        cells = [
            # Hours are of another machine: only their ratios within a column say something.
            cell_text(compared(cell, arm, own, preset.model), table.comparable and cell != "hours")
            if cell in arm.cells
            else ""
            for cell in table.cells
        ]
        lines.append(f"| {' | '.join([arm.arm.title, *cells])} |")
    if refused:
        lines += ["", "Not measured:", "", *refused]
    lines += ["", "Notes:", "", *(f"- {note}" for note in (*table.notes, *preset.notes)), ""]
    return "\n".join(lines)


def _title(cell: str) -> str:
    return cell.replace(".", " ", 1).replace("_", " ")  # the arm's dot, not a number's
