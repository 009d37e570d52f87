"""The page of `bench.schedule`."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bench.fleet import Costs
from qresafe.dist.data import RESERVE_FROM

if TYPE_CHECKING:
    from bench.schedule import Cell, Compared

TARGET = 0.9


def page(
    costs: Costs,
    compared: Sequence[Compared],
    cells: Sequence[Cell],
    driven: Mapping[float, float],
) -> str:
    """Return the Markdown page."""
    real = [_costs(costs), _compared_table(compared)] if compared else [_assumed(costs)]
    parts = [
        _head("" if compared else " --actors 0"),
        "## The simulator against real actors",
        *real,
        "## 1,000 actors, simulated",
        _verdict(cells),
        _fleet_table(cells),
        "## What the driver may cost",
        _driver(costs, driven),
    ]
    return "\n\n".join(parts) + "\n"


def _head(options: str) -> str:
    return (
        "# How busy a large fleet is kept\n\n"
        f"Made by `python -m bench.schedule{options}` on {datetime.date.today()}, "
        f"{os.cpu_count()} CPU cores ({platform.machine()}), "
        f"load {os.getloadavg()[0]:.1f} at the end.\n\n"
        "**The 1,000 actors are simulated**: this machine cannot hold them. Real are the plan of "
        "batches (`stages.generate.in_batches`) and the rule of how many batches an actor holds "
        "(`dist.data.in_flight`); Ray Data's own rule (the next batch to the actor with the "
        "fewest) is written again in `bench/fleet.py`. The engine's latency is a formula: 50 µs "
        "per prompt token, padding included, and 25 ms per step until the longest answer of the "
        "batch ends, roughly a 7B model on one large GPU. Prompts are log-normal (median 60 "
        "tokens, at most 2,048), answers too (median 180, at most 512); refusals have 20 to 59 "
        "tokens. Busy is computing time as a share of the time from each actor's start to the "
        "end of the last batch."
    )


def _costs(costs: Costs) -> str:
    return (
        "Beside its computing a batch costs, measured with batches that compute nothing: "
        f"{1e3 * costs.driver:.1f} ms of the driver's CPU time, {1e3 * costs.reply:.0f} ms until "
        f"an idle actor has its next batch, {1e3 * costs.gap:.0f} ms between two batches that an "
        "actor holds already (wall time, beside whatever else ran here). Real actors sleep "
        "instead of computing, at twice the speed; the simulator is told when each of them was "
        "there, and predicts the rest."
    )


def _assumed(costs: Costs) -> str:
    return (
        "**Not compared in this run** (`--actors 0`). What a batch costs beside its computing is "
        f"assumed: {1e3 * costs.driver:g} ms of the driver, {1e3 * costs.reply:g} ms until an "
        f"idle actor has its next batch, {1e3 * costs.gap:g} ms between two that it holds already."
    )


def _compared_table(compared: Sequence[Compared]) -> str:
    lines = [
        "| answers | actors | batches | mean s | busy, measured | busy, predicted "
        "| predicted, costs left out |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.load} | {row.actors} | {row.batches} | {row.seconds:.1f} "
        f"| {_share(row.measured)} | {_share(row.predicted)} | {_share(row.without_costs)} |"
        for row in compared
    ]
    worst = max(abs(row.measured - row.predicted) for row in compared)
    return "\n".join(lines) + f"\n\nLargest difference: {100 * worst:.1f} points."


def _verdict(cells: Sequence[Cell]) -> str:
    loads = list(dict.fromkeys(cell.load for cell in cells))
    enough = {load: _enough([cell for cell in cells if cell.load == load]) for load in loads}
    told = [
        f"{load}: from {each} batches per actor on" if each else f"{load}: **not reached**"
        for load, each in enough.items()
    ]
    return (
        f"Target: at least {100 * TARGET:.0f} % busy. Reached for {'; '.join(told)}. With fewer, "
        "no order helps: all actors wait for the last batches, and the remedy is fewer workers "
        "or a smaller `generate.batch_size`. A batch holds 16 prompts; actors become ready one "
        "after another within 60 s. "
        f"From {RESERVE_FROM} batches per actor on each holds one in reserve, which hides the "
        "driver's reply; before, each did always, and the column shows what that cost."
    )


def _enough(cells: Sequence[Cell]) -> int | None:
    """Return the fewest batches per actor from which on all cells meet the target."""
    found = None
    for cell in sorted(cells, key=lambda cell: -cell.each):
        if cell.ours < TARGET:
            break
        found = cell.each
    return found


def _fleet_table(cells: Sequence[Cell]) -> str:
    lines = [
        "| answers | batches per actor | mean s of a batch | busy | one always in reserve "
        "| batches in the rows' order |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {cell.load} | {cell.each} | {cell.seconds:.1f} | {_share(cell.ours)} "
        f"| {_share(cell.reserve)} | {_share(cell.unplanned)} |"
        for cell in cells
    ]
    return "\n".join(lines)


def _driver(costs: Costs, driven: Mapping[float, float]) -> str:
    lines = [
        "One driver serves all actors, so that what it spends on a batch bounds the fleet. The "
        f"simulation above counts {1e3 * costs.driver:.1f} ms for each; whether that "
        "grows with the number of actors could not be measured here. Chat answers, 8 "
        "batches per actor, no other costs:",
        "",
        "| driver, ms per batch | busy |",
        "|---:|---:|",
    ]
    lines += [f"| {1e3 * cost:g} | {_share(busy)} |" for cost, busy in driven.items()]
    return "\n".join(lines)


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"
