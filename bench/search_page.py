"""The page of `bench.search`: what was found, what it cost, and which bounds hold."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Found = Mapping[str, Any]


def page(found: Mapping[str, Found]) -> str:
    """Return the Markdown page of the pieces that were measured."""
    head = (
        "# Results of searches\n\n"
        f"Made by `make bench-search` (`python -m bench.search`) on {datetime.date.today()}, "
        f"{os.cpu_count()} CPU cores ({platform.machine()}), embedded model, space "
        "`tune_spaces/embedded.yaml`. A figure's command is the heading's piece: "
        "`python -m bench.search --only <piece>`."
    )
    parts = [head] + [PARTS[piece](found[piece]) for piece in PARTS if piece in found]
    return "\n\n".join(parts) + "\n"


def best_part(found: Found) -> str:
    """Return the section of the search for something better than the default."""
    names = [name for name, _ in found["objectives"]]
    lines = [
        "## best",
        verdict(found),
        table(["model", "prompts", *names, "weighted sum"], list(_confirmed(found))),
        _winner_values(found),
        _cost(found),
        _sharing(found),
    ]
    return "\n\n".join(line for line in lines if line)


def verdict(found: Found) -> str:
    """Return the sentence that says whether a better spec than the default was found."""
    rows = found["rows"]
    statuses = {s: sum(row["status"] == s for row in rows) for s in ("completed", "failed")}
    told = f"{len(rows)} trials ({statuses['completed']} completed, {statuses['failed']} failed). "
    if not found["winner"]:
        return told + "**None was found**: the default spec is the best on the validation prompts."
    if not found["confirmation"]:
        return told + f"Trial {found['winner']} is the best on the validation prompts."
    sums = {model: _sum(found, model, "test") for model in ("default", "winner")}
    better = sums["winner"] < sums["default"]
    seeds = sorted({row["seed"] for row in found["confirmation"]})
    return told + (
        f"**{'Found' if better else 'None was found'}**: trial {found['winner']}, chosen on the "
        f"validation prompts with seed 0, has {sums['winner']:.4f} on the untouched test prompts "
        f"against the default's {sums['default']:.4f} (weighted sum of objectives, mean of seeds "
        f"{', '.join(map(str, seeds))}; lower is better)."
    )


def asha_part(found: Found) -> str:
    """Return the section of successive halving."""
    whole, halved = found["all"], found["asha"]
    saved = 1 - halved["steps"] / whole["steps"]
    same = halved["winner"] == whole["winner"]
    holds = saved >= 0.3 and same
    rows = [
        [name, one["trials"], one["stopped"], f"{one['steps']:.0f}", f"trial {one['winner']}"]
        for name, one in (("without", whole), ("with ASHA", halved))
    ]
    shown = table(["same 16 random trials", "trials", "stopped", "steps", "winner"], rows)
    said = (
        f"ASHA saved {100 * saved:.0f} % of the steps and ended with "
        f"{'the same winner' if same else 'another winner'} (bound: at least 30 % at an equal best "
        f"value: {'holds' if holds else '**does not hold**'})."
    )
    return f"## asha\n\n{shown}\n\n{said}"


def kills_part(found: Found) -> str:
    """Return the section of the killed driver."""
    moments = ", ".join(map(str, found["killed_with_rows"]))
    same = "the same finished table" if found["equal"] else "**another table**"
    return (
        f"## kills\n\nThe driver was killed by SIGKILL {len(found['killed_with_rows'])} times, "
        f"with {moments} of {found['trials']} rows written; resumed, it ended with {same} as a "
        "search that was left alone: every column but the times is equal."
    )


def overhead_part(found: Found) -> str:
    """Return the section of Tune's overhead."""
    rows = []
    names = {"process": "in Tune's own process", "train": "as a Ray Train run, one worker"}
    for kind, one in found.items():
        spent = _spent(one["sessions"])
        rows.append(
            [names[kind], spent["trials"], f"{spent['held']:.0f}", f"{spent['own']:.0f}",
             f"{one['training_seconds']:.0f}", f"{100 * (spent['held'] / spent['own'] - 1):.0f} %"]
        )  # fmt: skip
    head = ["a trial", "trials", "slots × wall, s", "trials' own, s", "of it training, s",
            "overhead of Tune"]  # fmt: skip
    told = (
        "Four trials on two slots: the start of Tune and the idle slot at the end weigh more than "
        "in the 32 trials above."
    )
    return f"## overhead\n\n{table(head, rows)}\n\n{told}"


PARTS: dict[str, Callable[[Found], str]] = {
    "best": best_part,
    "asha": asha_part,
    "kills": kills_part,
    "overhead": overhead_part,
}


def table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table; empty without rows."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _confirmed(found: Found) -> Any:
    for model in ("W", "Q0", "default", "winner"):
        for split in ("validation", "test"):
            mine = _of(found, model, split)
            if not mine:
                continue
            cells = []
            for name, _ in found["objectives"]:
                values = [100 * row["metrics"][name] for row in mine]
                each = "/".join(f"{value:.1f}" for value in values)
                cells.append(f"{statistics.fmean(values):.1f} ({each})")
            yield [model, split, *cells, f"{_sum(found, model, split):.4f}"]


def _of(found: Found, model: str, split: str) -> list[Found]:
    rows = found["confirmation"]
    return [row for row in rows if (row["model"], row["split"]) == (model, split)]


def _sum(found: Found, model: str, split: str) -> float:
    weights = found["objectives"]
    sums = [
        sum(weight * row["metrics"][name] for name, weight in weights)
        for row in _of(found, model, split)
    ]
    return statistics.fmean(sums) if sums else float("inf")


def _winner_values(found: Found) -> str:
    if not found["winner"]:
        return ""
    params = found["rows"][found["winner"]]["params"]
    told = ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in params.items()
    )
    return f"The winner sets {told}."


def _spent(sessions: Sequence[Found]) -> dict[str, float]:
    held = sum(session["slots"] * session["seconds"] for session in sessions)
    own = sum(session["trial_seconds"] for session in sessions)
    return {"held": held, "own": own, "trials": sum(session["trials"] for session in sessions)}


def _cost(found: Found) -> str:
    spent = _spent(found["sessions"])
    if not spent["own"]:
        return ""
    over = spent["held"] / spent["own"] - 1
    holds = "holds" if over <= 0.1 else "**does not hold**"
    return (
        f"Tune: {spent['trials']} trials took {spent['own']:.0f} s of their own; the slots were "
        f"held for {spent['held']:.0f} s, {100 * over:.1f} % more (process starts, waiting for "
        f"results, the idle slot at the end; bound 10 %: {holds})."
    )


def _sharing(found: Found) -> str:
    rows = [
        [stage, f"{one['count']:.0f}", f"{one['seconds']:.0f}"]
        for stage, one in found["stages"].items()
    ]
    note = (
        "Stages computed, the confirmation's included (three seeds of quantize and pairs, two "
        "patches for each):"
    )
    return f"{note}\n\n{table(['stage', 'times', 'seconds'], rows)}"
