"""What a report shows, as plain data for its templates: tables, plots, cost, provenance."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qresafe.artifacts import Artifact
from qresafe.stages.arms import ADAPTER, CONTROL, Q0, Q, W
from qresafe.stages.comparison import ArmResult, Comparison, FlipResult, Share
from qresafe.stages.measures import BY_NAME, MEASURES, Measure
from qresafe.stages.narrative import interval, measurable, percent, points
from qresafe.stages.plots import PAINTS, Dot, Line, heat_plot, interval_plot, line_plot

# Arm -> (short name, what it is).
ARMS = {
    W: ("W", "the model in full precision"),
    CONTROL: ("control", "the quantizer's fine-tuning alone, in full precision"),
    Q0: ("Q0", "the quantized model"),
    Q: ("Q", "the quantized model, patched and reloaded from disk"),
    ADAPTER: ("unrounded", "Q's patch before rounding to the grid"),
}


class Cell(NamedTuple):
    """One figure of a table."""

    value: str
    detail: str  # interval and counts
    left_out: str = ""  # what is in no share
    cluster: str = ""  # the interval that knows of clusters


class TableRow(NamedTuple):
    """A measure over all arms."""

    title: str
    meaning: str
    cells: list[Cell | None]


class Panel(NamedTuple):
    """A plot with its heading."""

    title: str
    note: str
    svg: str


class FlipRow(NamedTuple):
    """A line of the table of paired changes."""

    step: str
    measure: str
    n: int
    gained: int
    lost: int
    change: str  # in points, with its interval
    p: str
    significant: bool
    detectable: str


class CostRow(NamedTuple):
    """A stage's time."""

    stage: str
    seconds: float
    startup: float | None
    speed: str
    reused: bool


def short(label: str) -> str:
    """Return an arm's name as tables show it."""
    return ARMS[label][0] if label in ARMS else label


def paint(label: str) -> str:
    """Return the colour variable of an arm."""
    return f"arm-{label}" if f"arm-{label}" in PAINTS else "arm-other"


def panels(comparison: Comparison) -> list[Panel]:
    """Return one interval plot per measure that an arm has."""
    return [
        Panel(measure.title, _panel_note(measure), interval_plot(measure.title, dots))
        for measure in MEASURES
        if (dots := _dots(comparison, measure))
    ]


def table(comparison: Comparison) -> list[TableRow]:
    """Return the full table: measures, utility and parts by benchmark, each with n."""
    rows = []
    for measure in MEASURES:
        cells = [_cell(arm.measures.get(measure.name)) for arm in comparison.arms]
        rows.append(TableRow(measure.title, measure.meaning, cells))
        for benchmark in comparison.arms[0].by_benchmark:
            found = [arm.by_benchmark[benchmark].get(measure.name) for arm in comparison.arms]
            rows.append(TableRow(f"… on {benchmark}", "", [_cell(share) for share in found]))
    rows.append(TableRow("ROUGE-L", "mean F1, in per cent", _each(comparison, _rouge)))
    rows.append(TableRow("perplexity", "of the reference answers", _each(comparison, _perplexity)))
    return [row for row in rows if any(row.cells)]


def flips(comparison: Comparison) -> list[FlipRow]:
    """Return the paired changes, step by step."""
    return [
        FlipRow(
            f"{short(f.before)} → {short(f.after)}",
            BY_NAME[f.measure].title,
            f.n,
            f.gained,
            f.lost,
            _change(f),
            _p(f.p_holm),
            measurable(f),
            percent(f.detectable),
        )
        for f in comparison.flips
    ]


def curves(history: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Return the plots of a patch's training: loss, and what each re-masking found.

    Args:
        history: Lines of history.jsonl: step, loss, parts, and mask where one was made.
    """
    if not history:
        return []
    steps = [float(record["step"]) for record in history]
    lines = [Line("loss", "ink", steps, [record["loss"] for record in history])]
    terms = list(history[0].get("parts", {}))
    if len(terms) > 1:
        lines += [Line(t, "muted", steps, [r["parts"][t] for r in history]) for t in terms]
    title = "Loss" if len(terms) > 1 else f"Loss ({''.join(terms)})"
    found = [Panel(title, "mean over each batch, nats", line_plot("loss", lines, "step"))]
    masks = [(record["step"], record["mask"]) for record in history if record.get("mask")]
    overlaps = [(step, mask["overlap"]) for step, mask in masks if mask["overlap"] is not None]
    if overlaps:
        xs, ys = zip(*overlaps, strict=True)
        line = Line("overlap", "accent", xs, [100 * y for y in ys])
        note = "weights that stay in the mask at each re-masking, per cent"
        svg = line_plot("mask overlap", [line], "step", right=steps[-1], top=100)
        found.append(Panel("Mask overlap", note, svg))
    return found


_PLACE = re.compile(r"\.(\d+)\.(?:.*\.)?([^.]+)$")


def layers(counts: Mapping[str, Any]) -> Panel | None:
    """Return the heat plot of codes changed by layer; None without such counts.

    Args:
        counts: Of the export stage: changed_by_layer and codes_by_layer, by layer name.
    """
    changed, sizes = counts.get("changed_by_layer", {}), counts.get("codes_by_layer", {})
    places = {name: found.groups() for name in changed if (found := _PLACE.search(name))}
    if not places or not sizes:
        return None
    rows = list(dict.fromkeys(kind for _, kind in places.values()))
    columns = sorted({int(block) for block, _ in places.values()})
    cells = {
        (rows.index(kind), columns.index(int(block))): changed[name] / sizes[name]
        for name, (block, kind) in places.items()
    }
    svg = heat_plot("codes changed", rows, [str(column) for column in columns], cells)
    return Panel("Codes changed", "per cent of each layer's codes", svg)


def cost(stages: Sequence[tuple[str, Artifact]], session: float = 0.0) -> list[CostRow]:
    """Return every stage's time, from the manifest of the run that computed it.

    Args:
        stages: (name, artefact) in order.
        session: Seconds until the cluster was reached; 0 where there is none.
    """
    rows = [CostRow("Ray session", session, session, "", False)] if session else []
    for name, artifact in stages:
        counts = artifact.manifest.counts
        speed = counts.get("tokens_per_second")
        rows.append(
            CostRow(
                name,
                artifact.manifest.seconds,
                counts.get("startup_seconds"),
                f"{speed:,.0f}" if speed else "",
                artifact.reused,
            )
        )
    return rows


def counts(comparison: Comparison) -> list[tuple[Any, ...]]:
    """Return what each judge said of each arm and axis, as rows of a table."""
    return [
        (
            short(arm.label),
            c.judge,
            c.axis,
            c.n,
            c.refused,
            c.partial,
            c.complied,
            c.incoherent,
            c.undecided,
        )
        for arm in comparison.arms
        for c in arm.counts
    ]


def attribution(comparison: Comparison) -> list[tuple[str, ...]]:
    """Return the split of each measure's change between W and Q0, in points."""
    return [
        (BY_NAME[part.measure].title, *map(points, (part.total, part.fine_tuning, part.precision)))
        for part in comparison.attribution
    ]


def agreement(comparison: Comparison) -> list[tuple[Any, ...]]:
    """Return how far the judges agree, as rows of a table."""
    return [
        (
            short(a.arm),
            f"{a.first}, {a.second}",
            a.n,
            percent(a.same / a.n if a.n else None),
            "–" if a.kappa is None else f"{a.kappa:.2f}",
        )
        for a in comparison.agreement
    ]


def seeds(spec: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return every key called `seed` in a resolved spec, by its dotted path."""
    found: dict[str, Any] = {}
    for key, value in spec.items():
        if isinstance(value, Mapping):
            found |= seeds(value, f"{path}{key}.")
        elif key == "seed":
            found[path + key] = value
    return found


def _panel_note(measure: Measure) -> str:
    return f"{measure.meaning}; {measure.better}er is better"


def _dots(comparison: Comparison, measure: Measure) -> list[Dot]:
    found = [(arm.label, arm.measures.get(measure.name)) for arm in comparison.arms]
    return [
        Dot(short(label), paint(label), share.share, share.low, share.high)
        for label, share in found
        if share is not None and share.share is not None
    ]


def _cell(share: Share | None) -> Cell | None:
    if share is None:
        return None
    left_out = f"{share.undecided} undecided" if share.undecided else ""
    detail = f"{interval(share)} · {share.yes}/{share.n}"
    return Cell(percent(share.share), detail, left_out, _cluster(share))


def _cluster(share: Share) -> str:
    if share.cluster_low is None or share.cluster_high is None:
        return ""
    return f"{100 * share.cluster_low:.1f}–{100 * share.cluster_high:.1f} · {share.clusters}"


def _each(comparison: Comparison, make: Any) -> list[Cell | None]:
    return [make(arm) if arm.utility else None for arm in comparison.arms]


def _rouge(arm: ArmResult) -> Cell | None:
    u = arm.utility
    if u is None:
        return None
    low, high = 100 * u.rouge_l_low, 100 * u.rouge_l_high
    return Cell(f"{100 * u.rouge_l:.1f}", f"{low:.1f}–{high:.1f} · n {u.n}")


def _perplexity(arm: ArmResult) -> Cell | None:
    u = arm.utility
    if u is None or u.perplexity is None:
        return None
    return Cell(f"{u.perplexity:.3g}", f"{u.target_tokens:,} tokens")


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _change(flip: FlipResult) -> str:
    low, high = points(flip.low), points(flip.high)
    return f"{points(flip.difference)} ({low} to {high})"
