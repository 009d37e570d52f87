"""The page of `bench.faults`: the table of faults, and what the runs that failed said."""

from __future__ import annotations

import collections
import datetime
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import psutil
import ray
import torch

if TYPE_CHECKING:
    from bench.faults import Result


def page(results: Sequence[Result], seed: int) -> str:
    """Return docs/reliability/faults.md.

    Args:
        results: All faults that hit something.
        seed: What they were drawn with.
    """
    return "\n\n".join([_head(results, seed), _table(results), _words(results)]) + "\n"


def host_page(results: Sequence[Result]) -> str:
    """Return docs/reliability/host-faults.md."""
    good = sum(survived(result) for result in results)
    head = (
        "# Faults of whole hosts\n\n"
        f"Made by `python -m bench.host_faults` (last on {datetime.date.today()}): {_machine()}. "
        "Three hosts, each a network namespace of this machine: a head that computes nothing, and "
        "two with a CPU each that share a folder; the driver runs on the first of these. "
        "*Cut off*: its link is down, nothing of it dies. *Until Ray gave it up*: its node is "
        "counted as dead, its work goes elsewhere or waits; back on the network its raylet ends, "
        "and is started again as a supervisor would. *Killed and started again*: every process of "
        "the head's host, and a head at the same address at once.\n\n"
        f"**{good} of {len(results)} faults ended in the fault-free result, row by row.** A "
        "command that fails is run again, as in [faults.md](faults.md), which explains the columns."
    )
    rows = [replace(each, kind=f"{each.workload}: {each.kind}") for each in results]
    return "\n\n".join([head, _table(rows), _words(rows)]) + "\n"


def survived(result: Result) -> bool:
    """Return whether the command ended well at last, with the fault-free result."""
    return result.ended and not result.difference


def _head(results: Sequence[Result], seed: int) -> str:
    good = sum(survived(result) for result in results)
    alone = sum(survived(result) and result.runs == 1 for result in results)
    lost = sum(result.difference.lost for result in results)
    doubled = sum(result.difference.doubled for result in results)
    commands = collections.Counter(result.workload for result in results)
    told = ", ".join(f"{count} in {name}" for name, count in sorted(commands.items()))
    return (
        "# Random faults\n\n"
        f"Made by `make bench-faults` (seed {seed}) on {datetime.date.today()}: "
        f"{_machine()}.\n\n"
        f"**{good} of {len(results)} faults ({told}) ended in the fault-free result; {lost} rows "
        f"lost, {doubled} doubled.** {alone} were got over without running the command again.\n\n"
        "Each fault hits one command (`qresafe generate`, `patch` on two Ray workers, or `search` "
        "with five trials) on the embedded model, at a random moment, on a Ray head with two CPUs. "
        "If the command fails, or takes four times its fault-free time and 90 s more (then it "
        "is killed, and counts as hung), it is run again; a lost head is started again at the same "
        "address, without what its GCS knew. *Survived*: at last it ended well, and completions, "
        "weights, codes, step records or trials equal those of a run without faults, row by row. "
        "*Extra time* is against that run; on a busy machine it has a wide spread."
    )


def _machine() -> str:
    memory, load = psutil.virtual_memory().total / 2**30, os.getloadavg()[2]
    return (
        f"{os.cpu_count()} CPU cores ({platform.machine()}), {memory:.0f} GiB, load average "
        f"{load:.0f} over the last quarter of an hour, ray {ray.__version__}, "
        f"torch {torch.__version__}"
    )


def _table(results: Sequence[Result]) -> str:
    by_kind: dict[str, list[Result]] = collections.defaultdict(list)
    for result in results:
        by_kind[result.kind].append(result)
    lines = [
        "| fault | injected | survived | by itself | hung | lost rows | double rows | other rows "
        "| extra time, median (most) |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [_line(kind, by_kind[kind]) for kind in sorted(by_kind)]
    return "\n".join([*lines, _line("**all**", results)])


def _line(kind: str, results: Sequence[Result]) -> str:
    extra = [result.seconds - result.baseline for result in results]
    cells = [
        kind,
        len(results),
        sum(survived(result) for result in results),
        sum(survived(result) and result.runs == 1 for result in results),
        sum(result.hangs for result in results),
        sum(result.difference.lost for result in results),
        sum(result.difference.doubled for result in results),
        sum(result.difference.changed for result in results),
        f"{statistics.median(extra):.0f} s ({max(extra):.0f} s)" if extra else "",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _words(results: Sequence[Result]) -> str:
    said = collections.Counter(
        (result.kind, " ".join(line.split())) for result in results for line in result.said
    )
    lines = [f"- {kind}: `{line.replace('`', '')}` ({count})" for (kind, line), count in
             sorted(said.items())]  # fmt: skip
    return "## What the commands that failed said last\n\n" + "\n".join(lines or ["nothing"])
