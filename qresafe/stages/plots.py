"""Plots as SVG that belongs to its page: text stays text, colours are the page's own variables.

Matplotlib draws with stand-in colours, one per name of `PAINTS`; afterwards each becomes
`var(--name)`, so that light and dark mode, and print, are the style sheet's business alone.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import matplotlib.patches
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PAINTS = ("ink", "muted", "rule", "accent", "arm-W", "arm-control", "arm-Q0", "arm-Q", "arm-other")
STAND_IN = {name: f"#0a0b{index:02x}" for index, name in enumerate(PAINTS)}
WIDTH = 3.6  # inches at 100 dots: a phone's width, so that nothing shrinks there
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 8.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.edgecolor": STAND_IN["rule"],
    "axes.labelcolor": STAND_IN["muted"],
    "text.color": STAND_IN["ink"],
    "xtick.color": STAND_IN["rule"],
    "ytick.color": STAND_IN["rule"],
    "xtick.labelcolor": STAND_IN["muted"],
    "ytick.labelcolor": STAND_IN["ink"],
    "xtick.major.size": 2.5,
    "ytick.major.size": 0,
}


class Dot(NamedTuple):
    """One arm in an interval plot; shares in [0, 1]."""

    label: str
    paint: str
    share: float
    low: float
    high: float


class Line(NamedTuple):
    """One curve."""

    label: str
    paint: str
    xs: Sequence[float]
    ys: Sequence[float]


def interval_plot(name: str, dots: Sequence[Dot]) -> str:
    """Draw one row per arm: the share as a dot, its 95 % interval as a bar, from 0 to 100 %."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, 0.42 + 0.235 * len(dots)))
        axes = figure.add_axes(inches(figure, left=0.86, right=0.62, bottom=0.3, top=0.06))
        for place, dot in enumerate(dots):
            paint = STAND_IN[dot.paint]
            axes.plot([100 * dot.low, 100 * dot.high], [place, place], color=paint, lw=4, alpha=0.3)
            axes.plot([100 * dot.share], [place], "o", color=paint, ms=6.5, clip_on=False)
            axes.annotate(
                f"{100 * dot.share:.1f} %", (1.29, place), xycoords=("axes fraction", "data"),
                va="center", ha="right",
            )  # fmt: skip
        axes.set_yticks(range(len(dots)), [dot.label for dot in dots])
        axes.set_ylim(len(dots) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
        axes.grid(axis="x", color=STAND_IN["rule"], lw=0.5)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", pad=8)
        axes.spines[["left", "bottom"]].set_visible(False)
        spoken = "; ".join(f"{dot.label} {100 * dot.share:.1f} %" for dot in dots)
        return svg(figure, f"{name}: {spoken}")


def line_plot(
    name: str,
    lines: Sequence[Line],
    x_label: str,
    *,
    right: float | None = None,
    top: float | None = None,
) -> str:
    """Draw curves from 0 upwards, each named at its end rather than in a legend.

    Args:
        name: What it shows, for readers who cannot see it.
        lines: The curves; short ones get a dot at each point.
        x_label: Of the horizontal axis.
        right: End of the horizontal axis; None: what the curves need.
        top: End of the vertical axis; None: what the curves need.
    """
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, 1.9))
        axes = figure.add_axes(inches(figure, left=0.5, right=0.72, bottom=0.4, top=0.1))
        for line in lines:
            style = "-o" if len(line.xs) < 20 else "-"
            paint = STAND_IN[line.paint]
            axes.plot(line.xs, line.ys, style, color=paint, lw=1.4, ms=3.5, clip_on=False)
        axes.set_xlabel(x_label)
        axes.set_ylim(0, top)
        axes.set_xlim(0, right)
        axes.grid(axis="y", color=STAND_IN["rule"], lw=0.5)
        axes.spines[["left"]].set_visible(False)
        axes.tick_params(axis="y", labelcolor=STAND_IN["muted"])
        axes.locator_params(axis="both", nbins=5)
        _name_ends(axes, lines)
        return svg(figure, name)


def heat_plot(
    name: str,
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Mapping[tuple[int, int], float],
    x_label: str = "layer",
    darkest: float | None = None,
) -> str:
    """Draw shares by (row, column) as squares that are the darker the larger the share.

    Args:
        name: What it shows, for readers who cannot see it.
        rows: Their names.
        columns: Their names.
        cells: (row, column) -> share in [0, 1].
        x_label: What columns are.
        darkest: The share of the darkest square; None: the largest that there is.
    """
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        height = 0.5 + 0.24 * len(rows)
        figure = Figure(figsize=(WIDTH, height))
        axes = figure.add_axes(inches(figure, left=0.8, right=0.05, bottom=0.4, top=0.05))
        largest = darkest or max(cells.values(), default=0.0) or 1.0
        written = len(columns) <= 8
        for (row, column), share in cells.items():
            box = matplotlib.patches.Rectangle(
                (column - 0.47, row - 0.46), 0.94, 0.92, lw=0, fc=STAND_IN["accent"],
                alpha=0.04 + 0.66 * share / largest,
            )  # fmt: skip
            axes.add_patch(box)
            if written:
                axes.text(column, row, f"{100 * share:.1f}", ha="center", va="center", size=7.5)
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        every = max(1, len(columns) // (8 if max(map(len, columns)) < 3 else 5))
        axes.set_xticks(range(0, len(columns), every), columns[::every])
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xlabel(x_label)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        return svg(figure, name)


def inches(figure: Figure, *, left: float, right: float, bottom: float, top: float) -> Any:
    """Return the rectangle that leaves these margins, in inches, as matplotlib wants it."""
    width, height = figure.get_size_inches()
    return (
        left / width,
        bottom / height,
        (width - left - right) / width,
        (height - bottom - top) / height,
    )


def _name_ends(axes: Axes, lines: Sequence[Line]) -> None:
    """Write each line's name beside its last point, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    lowest = -1.0
    for line in sorted(lines, key=lambda line: line.ys[-1]):
        height = max((line.ys[-1] - low) / (high - low), lowest + 0.1)
        lowest = height
        axes.annotate(
            line.label, (1.03, height), xycoords="axes fraction", va="center",
            color=STAND_IN[line.paint],
        )  # fmt: skip


def svg(figure: Figure, spoken: str) -> str:
    """Return a figure as SVG that takes its colours and fonts from its page.

    Args:
        figure: Drawn with the colours of `STAND_IN`.
        spoken: What it shows, for readers who cannot see it.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    view = re.search(r'viewBox="[^"]+"', text)
    body = text[text.index("<defs>") :]  # behind the opening tag and its metadata
    body = re.sub(r"<style.*?</style>", "", body, count=1, flags=re.DOTALL)  # would hold page-wide
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # they repeat from plot to plot
    body = re.sub(r"font-family: [^;\"]+", "font-family: inherit", body)
    body = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font-size: \1", body)
    for name, stand_in in STAND_IN.items():
        body = body.replace(stand_in, f"var(--{name})")
    label = html.escape(spoken)
    opening = f'<svg class="plot" role="img" aria-label="{label}" {view[0] if view else ""}>'
    return re.sub(r"\s*\n\s*", "\n", opening + body)
