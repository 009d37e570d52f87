"""The plots of a search's page, in the style of `stages.plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qresafe.stages.plots import STAND_IN, STYLE, WIDTH, inches, svg


class Point(NamedTuple):
    """A trial in a scatter plot."""

    x: float
    y: float
    label: str
    kind: str  # "front", "winner", "default" or "" for the others


class Polyline(NamedTuple):
    """A trial in parallel coordinates: a height in [0, 1] per axis; None: no part in it."""

    heights: Sequence[float | None]
    kind: str


class Axis(NamedTuple):
    """One of parallel coordinates' axes: its name and what stands at its ends."""

    name: str
    low: str
    high: str


PAINT = {"front": "arm-Q", "winner": "arm-Q0", "default": "arm-W", "": "muted"}
SIZES = {"front": 5.5, "winner": 7.5, "default": 6.5, "": 4.0}
FOREMOST = ("front", "winner", "default")
WIDE = 2 * WIDTH + 0.4


def scatter_plot(name: str, points: Sequence[Point], x_label: str, y_label: str) -> str:
    """Draw two objectives of all trials; the front, the winner and the default stand out."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, 2.5))
        axes = figure.add_axes(inches(figure, left=0.55, right=0.15, bottom=0.45, top=0.15))
        for point in sorted(points, key=lambda point: list(SIZES).index(point.kind), reverse=True):
            paint, alpha = STAND_IN[PAINT[point.kind]], 1.0 if point.kind else 0.45
            style: dict[str, Any] = {
                "color": paint,
                "ms": SIZES[point.kind],
                "alpha": alpha,
                "clip_on": False,
            }
            axes.plot([point.x], [point.y], "D" if point.kind == "default" else "o", **style)
        _name_points(axes, [point for point in points if point.kind])
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.margins(0.08)
        axes.grid(color=STAND_IN["rule"], lw=0.5)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", labelcolor=STAND_IN["muted"])
        axes.locator_params(axis="both", nbins=5)
        return svg(figure, name)


def parallel_plot(name: str, axes_of: Sequence[Axis], lines: Sequence[Polyline]) -> str:
    """Draw one line per trial through the values of all keys and objectives."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(WIDE, 2.8))
        axes = figure.add_axes(inches(figure, left=0.45, right=0.45, bottom=0.85, top=0.3))
        for line in sorted(lines, key=lambda line: bool(line.kind)):
            known = [(x, y) for x, y in enumerate(line.heights) if y is not None]
            width, alpha = (1.6, 0.95) if line.kind else (0.8, 0.3)
            paint = STAND_IN[PAINT[line.kind]]
            xs, ys = [x for x, _ in known], [y for _, y in known]
            dashes = "--" if line.kind == "default" else "-"
            axes.plot(xs, ys, dashes, color=paint, lw=width, alpha=alpha, clip_on=False)
        for place, axis in enumerate(axes_of):
            axes.axvline(place, color=STAND_IN["rule"], lw=0.8, zorder=0)
            muted: dict[str, Any] = {"color": STAND_IN["muted"], "ha": "center", "fontsize": 7.5}
            axes.text(place, 1.06, axis.high, va="bottom", **muted)
            axes.text(place, -0.06, axis.low, va="top", **muted)
            axes.text(place, -0.2, axis.name.replace(" ", "\n"), va="top", ha="center")
        axes.set_ylim(0, 1)
        axes.set_xlim(0, max(1, len(axes_of) - 1))
        axes.axis("off")
        return svg(figure, name)


def importance_plot(name: str, shares: Mapping[str, float]) -> str:
    """Draw each key's importance as a bar, the largest first."""
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, 0.42 + 0.235 * len(ordered)))
        axes = figure.add_axes(inches(figure, left=1.15, right=0.5, bottom=0.3, top=0.06))
        for place, (_, share) in enumerate(ordered):
            axes.barh([place], [100 * share], 0.55, color=STAND_IN["accent"], alpha=0.75)
            axes.text(100 * share + 1.5, place, f"{100 * share:.0f} %", va="center")
        axes.set_yticks(range(len(ordered)), [key for key, _ in ordered])
        axes.set_ylim(len(ordered) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.set_xticks([0, 50, 100], ["0", "50", "100 %"])
        axes.spines[["left", "bottom"]].set_visible(False)
        return svg(figure, f"{name}: " + "; ".join(f"{k} {100 * v:.0f} %" for k, v in ordered))


def curve_plot(name: str, curves: Sequence[tuple[Sequence[float], Sequence[float], str]]) -> str:
    """Draw the probes of all trials against steps, in per cent.

    Args:
        name: What is probed.
        curves: (steps, shares, kind) of each trial; kind as in `Point`, or "stopped".
    """
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, 2.1))
        axes = figure.add_axes(inches(figure, left=0.5, right=0.15, bottom=0.42, top=0.12))
        for steps, shares, kind in sorted(curves, key=lambda curve: curve[2] in FOREMOST):
            paint = STAND_IN[PAINT.get(kind, "muted")]
            width, alpha = (1.7, 0.95) if kind in FOREMOST else (0.9, 0.4)
            shown = [100 * share for share in shares]
            axes.plot(steps, shown, color=paint, lw=width, alpha=alpha, clip_on=False)
            if kind == "stopped":
                axes.plot(steps[-1:], [100 * shares[-1]], "x", color=paint, ms=4.5, clip_on=False)
        axes.set_xlabel("step")
        axes.set_ylim(0, None)
        axes.set_xlim(0, None)
        axes.grid(axis="y", color=STAND_IN["rule"], lw=0.5)
        axes.spines[["left"]].set_visible(False)
        axes.tick_params(axis="y", labelcolor=STAND_IN["muted"])
        axes.locator_params(axis="both", nbins=5)
        return svg(figure, name)


def _name_points(axes: Axes, points: Sequence[Point]) -> None:
    """Write each point's label beside it; points at one place share one label."""
    places: dict[tuple[float, float], list[Point]] = {}
    for point in points:
        places.setdefault((point.x, point.y), []).append(point)
    for number, (place, there) in enumerate(sorted(places.items())):
        below = number % 2 == 1  # neighbours' labels on different sides
        text = ", ".join(point.label for point in there[:3]) + (" …" if len(there) > 3 else "")
        paint = STAND_IN[PAINT[there[0].kind]]
        axes.annotate(
            text, place, xytext=(4, -10 if below else 4), textcoords="offset points", color=paint,
            fontsize=7.5,
        )  # fmt: skip
