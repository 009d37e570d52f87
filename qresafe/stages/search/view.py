"""What a search's page shows, as plain data for its template."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qresafe.search_space import Parameter
from qresafe.search_spec import Search
from qresafe.stages.report_view import Panel
from qresafe.stages.search.confirm import DEFAULT, SPLITS, WINNER, Confirmed
from qresafe.stages.search.ledger import Row
from qresafe.stages.search.metrics import METRICS_BY_NAME
from qresafe.stages.search.plots import (
    Axis,
    Point,
    Polyline,
    curve_plot,
    importance_plot,
    parallel_plot,
    scatter_plot,
)
from qresafe.stages.search.values import row_values

Kinds = Mapping[int, str]  # index -> "winner", "front", "default" or ""


class TrialLine(NamedTuple):
    """A line of the table of trials."""

    trial: int
    kind: str
    status: str  # "" for a completed trial
    values: list[str]
    figures: list[str]


def kinds(rows: Sequence[Row], best: Row | None, front: Sequence[Row]) -> dict[int, str]:
    """Return what is special about each trial."""
    found = {row.index: "" for row in rows}
    found |= {row.index: "front" for row in front}
    if 0 in found:
        found[0] = "default"
    if best is not None:
        found[best.index] = "winner"
    return found


def shown(name: str, value: float | None) -> str:
    """Return a metric's value as people read it."""
    if value is None:
        return "–"
    return f"{100 * value:.1f}" if METRICS_BY_NAME[name].percent else f"{value:,.0f}"


def title(name: str) -> str:
    """Return a metric's title with its unit."""
    metric = METRICS_BY_NAME[name]
    return f"{metric.title}, %" if metric.percent else metric.title


def short(key: str) -> str:
    """Return a key's last part, or two where the last says little."""
    *parents, last = key.split(".")
    return f"{parents[-1]}.{last}" if last in {"on", "score", "loss", "scope"} and parents else last


def value_text(value: Any) -> str:
    """Return a parameter's value as text."""
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def headline(
    search: Search, rows: Sequence[Row], best: Row | None, found: Sequence[Confirmed]
) -> str:
    """Return the page's first sentence: whether something better than the default was found."""
    if best is None:
        return "No trial was completed within the constraints."
    if best.index == 0:
        return "No trial is better than the default spec on the validation prompts."
    if not found:
        return f"Trial {best.index} is best on the validation prompts; it was not confirmed."
    before, after = (mean_score(search, found, model, "test") for model in (DEFAULT, WINNER))
    if after < before:
        return (
            f"Trial {best.index} is better than the default spec on the untouched test prompts: "
            f"weighted objectives {after:.3f} against {before:.3f}, {_seeds(search)}."
        )
    return (
        f"None was found: trial {best.index}, the best on the validation prompts, is no better "
        f"than the default spec on the test prompts ({after:.3f} against {before:.3f}, "
        f"{_seeds(search)})."
    )


def _seeds(search: Search) -> str:
    count = len(search.spec.confirm)
    return "with one seed" if count == 1 else f"the mean of {count} seeds"


def details(
    search: Search,
    rows: Sequence[Row],
    best: Row | None,
    front: Sequence[Row],
    found: Sequence[Confirmed],
) -> list[str]:
    """Return the sentences below the first one."""
    counted = [row for row in rows if row.same_as is None]
    ended = {s: sum(row.status == s for row in counted) for s in ("completed", "stopped", "failed")}
    twins = len(rows) - len(counted)
    told = [f"{count} {status}" for status, count in ended.items() if count]
    told += [f"{twins} equal to an earlier one"] if twins else []
    sentences = [f"{len(rows)} trials: {', '.join(told)}; {len(front)} on the Pareto front."]
    if found and best is not None and best.index:
        better, seeds = seeds_better(search, found), len(search.spec.confirm)
        terms = [_term(o.metric, o.weight) for o in search.spec.objectives]
        sentences.append(
            f"The winner's weighted sum on the test prompts is the lower one with {better} of "
            f"{seeds} seed{'s' if seeds > 1 else ''}. The sum is {' + '.join(terms)}."
        )
    return sentences


def _term(metric: str, weight: float) -> str:
    name = METRICS_BY_NAME[metric].title
    return name if weight == 1 else f"{weight:g} × {name}"


def weighted(search: Search, metrics: Mapping[str, float]) -> float:
    """Return the weighted sum of the objectives; infinite if one is not known."""
    total = 0.0
    for objective in search.spec.objectives:
        value = metrics.get(objective.metric)
        if value is None:
            return math.inf
        total += objective.weight * value
    return total


def mean_score(search: Search, found: Sequence[Confirmed], model: str, split: str) -> float:
    """Return the mean over seeds of a model's weighted objectives on a split."""
    scores = [weighted(search, c.metrics) for c in found if (c.model, c.split) == (model, split)]
    return statistics.fmean(scores) if scores else math.inf


def seeds_better(search: Search, found: Sequence[Confirmed]) -> int:
    """Return with how many seeds the winner's sum on test is below the default's."""
    by = {(c.model, c.seed): weighted(search, c.metrics) for c in found if c.split == "test"}
    return sum(by[WINNER, seed] < by[DEFAULT, seed] for seed in search.spec.confirm)


def fronts(search: Search, rows: Sequence[Row], marked: Kinds) -> list[Panel]:
    """Return a scatter plot of each pair of objectives."""
    panels = []
    names = [objective.metric for objective in search.spec.objectives]
    for x, y in itertools.combinations(names, 2):
        points = [
            Point(_scaled(x, row), _scaled(y, row), _label(row, marked), marked[row.index])
            for row in rows
            if row.status == "completed" and {x, y} <= set(row.metrics) and row.same_as is None
        ]
        if points:
            both = f"{METRICS_BY_NAME[x].title} and {METRICS_BY_NAME[y].title}"
            svg = scatter_plot(both, points, title(x), title(y))
            panels.append(Panel(both, "lower left is better", svg))
    return panels


def _scaled(name: str, row: Row) -> float:
    return row.metrics[name] * (100 if METRICS_BY_NAME[name].percent else 1)


def _label(row: Row, marked: Kinds) -> str:
    kind = marked[row.index]
    return "default" if kind == "default" else str(row.index)


def parallel(search: Search, rows: Sequence[Row], marked: Kinds) -> Panel | None:
    """Return the parallel coordinates of all completed trials."""
    done = [row for row in rows if row.status == "completed" and row.same_as is None]
    if not done:
        return None
    names = [objective.metric for objective in search.spec.objectives]
    values = {row.index: row_values(search, row) for row in done}
    ranges = {n: _range([row.metrics[n] for row in done if n in row.metrics]) for n in names}
    axes = [Axis(short(p.key), *_ends(p)) for p in search.space]
    axes += [Axis(METRICS_BY_NAME[n].title, *(shown(n, end) for end in ranges[n])) for n in names]
    lines = []
    for row in done:
        heights = [_height(p, values[row.index]) for p in search.space]
        heights += [_between(ranges[n], row.metrics.get(n)) for n in names]
        lines.append(Polyline(heights, marked[row.index]))
    svg = parallel_plot("parallel coordinates", axes, lines)
    note = "a line per trial: what it set, then what came of it (low is good)"
    return Panel("All trials", note, svg)


def _ends(parameter: Parameter) -> tuple[str, str]:
    ends = parameter.ends()
    return value_text(ends[0])[:12], value_text(ends[-1])[:12]


def _height(parameter: Parameter, values: Mapping[str, Any]) -> float | None:
    value = values.get(parameter.key)
    return None if value is None else parameter.position(value)


def _range(values: Sequence[float]) -> tuple[float, float]:
    return (min(values, default=0.0), max(values, default=1.0))


def _between(ends: tuple[float, float], value: float | None) -> float | None:
    if value is None:
        return None
    low, high = ends
    return (value - low) / (high - low) if high > low else 0.5


def importance(search: Search, rows: Sequence[Row]) -> list[Panel]:
    """Return the importance of each key, for each objective."""
    from qresafe.stages.search import optuna_proposer

    panels = []
    for place, objective in enumerate(search.spec.objectives):
        shares = optuna_proposer.importance(search, rows, place)
        if shares:
            name = METRICS_BY_NAME[objective.metric].title
            svg = importance_plot(name, {short(k): v for k, v in shares.items()})
            panels.append(Panel(name, "share of what a good value depends on", svg))
    return panels


def curves(search: Search, rows: Sequence[Row], marked: Kinds) -> Panel | None:
    """Return the probe's figures of all trials while they were trained."""
    metric = search.spec.scheduler.metric
    found = []
    for row in rows:
        curve = row.probed(metric)
        if curve and row.same_as is None:
            kind = "stopped" if row.status == "stopped" else marked[row.index]
            found.append((list(curve), list(curve.values()), kind))
    if not found:
        return None
    name = METRICS_BY_NAME[metric].title
    note = f"per cent of the {search.spec.probe.prompts} probe prompts; × stopped by the rule"
    return Panel(f"{name} while training", note, curve_plot(name, found))


def header(search: Search) -> tuple[list[str], list[str]]:
    """Return the headings of the table: keys and objectives."""
    return (
        [short(parameter.key) for parameter in search.space],
        [title(objective.metric) for objective in search.spec.objectives],
    )


def table(search: Search, rows: Sequence[Row], marked: Kinds) -> list[TrialLine]:
    """Return a line per trial, the best sum of objectives first."""
    lines = []
    for row in sorted(rows, key=lambda row: (weighted(search, row.metrics), row.index)):
        values = row_values(search, row)
        twin = "" if row.same_as is None else f"as {row.same_as}"
        status = twin or ("" if row.status == "completed" else row.status)
        figures = [shown(o.metric, row.metrics.get(o.metric)) for o in search.spec.objectives]
        shown_values = [value_text(values.get(p.key)) for p in search.space]
        lines.append(TrialLine(row.index, marked[row.index], status, shown_values, figures))
    return lines


def confirmation(search: Search, found: Sequence[Confirmed]) -> list[dict[str, Any]]:
    """Return a line per model and split: each objective's mean over seeds, and every seed."""
    lines = []
    for model, split in itertools.product(("W", "Q0", DEFAULT, WINNER), SPLITS):
        mine = [c for c in found if (c.model, c.split) == (model, split)]
        if mine:
            cells = [_cell(o.metric, mine) for o in search.spec.objectives]
            sums = [weighted(search, c.metrics) for c in mine]
            mean = statistics.fmean(sums)
            lines.append({"model": model, "split": split, "cells": cells, "sum": f"{mean:.3f}"})
    return lines


def _cell(metric: str, found: Sequence[Confirmed]) -> tuple[str, str]:
    values = [c.metrics.get(metric) for c in found]
    known = [value for value in values if value is not None]
    mean = statistics.fmean(known) if known else None
    return shown(metric, mean), " / ".join(shown(metric, value) for value in values)


def bias(search: Search, best: Row | None, found: Sequence[Confirmed]) -> str:
    """Return how much of the winner's lead on the validation prompts is left on others."""
    if best is None or not best.index or not found:
        return ""
    leads = {
        split: mean_score(search, found, DEFAULT, split) - mean_score(search, found, WINNER, split)
        for split in SPLITS
    }
    return (
        f"The winner's lead over the default, in the weighted sum of objectives: "
        f"{leads['validation']:+.3f} on the validation prompts, {leads['test']:+.3f} on the test "
        f"prompts. The winner was chosen on the former, with the experiment's own seed, so their "
        f"difference is what choosing has flattered it by."
    )
