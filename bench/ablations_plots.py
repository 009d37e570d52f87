"""The plots of `bench.ablations`: one panel per measure over a setting, and what is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt

from bench.ablations import Found
from bench.quantizers_plots import save_svg

PANELS = {
    "attack_success": "attack success, %",
    "over_refusal": "over-refusal, %",
    "exact_match": "exact match, %",
    "codes_changed": "codes changed, %",
}
PAINTS = ("#c0392b", "#2471a3", "#1e8449", "#b9770e", "#6c3483")
LOGARITHMIC = ("tau", "rank", "beta")


def curve_plot(rows: Sequence[Found], name: str, file: Path) -> None:
    """Draw a curve's lines: the mean over seeds, and every seed as a dot.

    Args:
        rows: Of one curve; a row's label is "line, value" or "value".
        name: The curve's name, as the title of the x axis.
        file: The SVG file to write.
    """
    lines: dict[str, dict[float, list[Found]]] = {}
    for one in rows:
        line, _, value = one.row.label.rpartition(", ")
        lines.setdefault(line, {}).setdefault(float(value), []).append(one)
    figure, panels = plt.subplots(1, len(PANELS), figsize=(12, 2.9))
    for panel, (measure, title) in zip(panels, PANELS.items(), strict=True):
        for (line, points), paint in zip(lines.items(), cycle(PAINTS), strict=False):
            at = sorted(points)
            each = [[_value(one, measure) for one in points[x]] for x in at]
            means = [sum(values) / len(values) for values in each]
            panel.plot(at, means, color=paint, linewidth=1.2, label=line or None)
            for x, values in zip(at, each, strict=True):
                panel.plot([x] * len(values), values, ".", color=paint, markersize=4)
        if name in LOGARITHMIC:
            panel.set_xscale("symlog", linthresh=0.001) if name == "tau" else panel.set_xscale(
                "log"
            )
        panel.set(xlabel=name, title=title)
        panel.title.set_fontsize(9)
    if len(lines) > 1:
        panels[0].legend(frameon=False, fontsize=7)
    save_svg(figure, file)


def races_plot(races: Mapping[str, Sequence[Found]], file: Path) -> None:
    """Draw attack success over the steps of each race, a line per seed."""
    figure, panels = plt.subplots(1, len(races), figsize=(12, 2.6), sharey=True, squeeze=False)
    for panel, (label, rows) in zip(panels[0], races.items(), strict=True):
        for one, paint in zip(rows, cycle(PAINTS), strict=False):
            steps, _, attacks = zip(*one.curve, strict=True)
            shares = [100 * share for share in attacks]
            panel.plot(steps, shares, color=paint, linewidth=1.2, label=f"seed {one.row.seed}")
        panel.set(xlabel="step", title=label)
        panel.title.set_fontsize(9)
    panels[0][0].set_ylabel("attack success, %")
    panels[0][-1].legend(frameon=False, fontsize=7)
    save_svg(figure, file)


def touched_plot(shares: Mapping[tuple[str, int], float], file: Path) -> None:
    """Draw the share of changed codes by projection (columns) and layer (rows)."""
    kinds = sorted({kind for kind, _ in shares})
    layers = sorted({layer for _, layer in shares})
    grid = [[100 * shares.get((kind, layer), 0.0) for kind in kinds] for layer in layers]
    figure, panel = plt.subplots(figsize=(5.5, 2.8))
    image = panel.imshow(grid, cmap="Reds", aspect="auto", vmin=0)
    panel.set_xticks(range(len(kinds)), kinds)
    panel.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    panel.set(xlabel="projection", ylabel="layer")
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            panel.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize=8)
    figure.colorbar(image, label="codes changed, %")
    save_svg(figure, file)


def _value(one: Found, measure: str) -> float:
    assert one.cell is not None
    if measure == "codes_changed":
        return 100 * (one.cell.codes_changed or 0.0)
    return 100 * (one.cell.measures.get(measure) or 0.0)
