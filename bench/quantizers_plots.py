"""The plots of `bench.quantizers`: bits against attack success, and what 16-bit weights buy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from bench.quantizers import Found

Table = Mapping[str, Sequence[Found]]  # label -> one result per seed
RISKS = ("I", "II", "III")
PAINTS = ("#555555", "#c0392b", "#2471a3", "#1e8449", "#b9770e")
PLAIN = "RTN"  # has no calibration set: drawn at every risk level
MIXED = "RTN INT2"  # what critical weights in 16 bits are compared with


def bits_plot(whole: Table, file: Path) -> None:
    """Draw each method's attack success over its widths: Q0 solid, Q dashed, a panel per risk."""
    families = _families(whole)
    paints = dict(zip(sorted({name for name, _ in families}), PAINTS, strict=False))
    figure, panels = plt.subplots(1, 3, figsize=(9, 3.2), sharey=True)
    for panel, risk in zip(panels, RISKS, strict=True):
        for (name, level), rows in families.items():
            if level in (risk, None):
                _lines(panel, name, rows, paints[name])
        panel.set(title=f"risk {risk}", xlabel="bits per weight", ylim=(-4, 108))
    panels[0].set_ylabel("attack success, %")
    if families:
        panels[0].legend(frameon=False, fontsize=7, title="Q0 solid, Q dashed", title_fontsize=7)
    save_svg(figure, file)


def size_plot(whole: Table, file: Path) -> None:
    """Draw attack success and exact match of two-bit rounding with more and more in 16 bits."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2))
    rows = {label: found for label, found in whole.items() if label.startswith(MIXED)}
    for panel, measure in zip(panels, ("attack_success", "exact_match"), strict=True):
        for label, found in rows.items():
            at = _mean([one.sizes["checkpoint_bytes"] / 1e6 for one in found])
            panel.scatter(at, mean_share(found, "Q0", measure), color=PAINTS[1], s=18)
            told = label.removeprefix(f"{MIXED} + ")
            place = (at, mean_share(found, "Q0", measure))
            panel.annotate(told, place, fontsize=7, xytext=(4, 3), textcoords="offset points")
        w = [mean_share(found, "W", measure) for found in rows.values()]
        if w:
            panel.axhline(_mean(w), color=PAINTS[0], linewidth=0.8, linestyle=":")
        panel.margins(x=0.35)
        panel.set(xlabel="checkpoint, MB", ylabel=f"{measure.replace('_', ' ')}, % (dotted: W)")
    save_svg(figure, file)


def mean_share(rows: Sequence[Found], arm: str, measure: str) -> float:
    """Return an arm's mean share over its seeds, in per cent."""
    counts = [one.arms[arm][measure] for one in rows if arm in one.arms]
    return _mean([100 * yes / max(n, 1) for yes, n in counts])


def _families(whole: Table) -> dict[tuple[str, str | None], dict[float, Sequence[Found]]]:
    """Return (method, risk) -> bits per weight -> results, of methods with several widths."""
    found: dict[tuple[str, str | None], dict[float, Sequence[Found]]] = {}
    for label, rows in whole.items():
        parts = re.fullmatch(r"([A-Za-z-]+) INT\d(?:, risk (I+))?", label)
        if parts:
            bits = _mean([one.sizes["bits_per_weight"] for one in rows])
            found.setdefault((parts[1], parts[2]), {})[bits] = rows
    return {key: dict(sorted(widths.items())) for key, widths in found.items()}


def _lines(panel: Any, name: str, widths: Mapping[float, Sequence[Found]], paint: str) -> None:
    q0 = [mean_share(rows, "Q0", "attack_success") for rows in widths.values()]
    panel.plot(list(widths), q0, marker="o", markersize=3, linewidth=1, color=paint, label=name)
    patched = {bits: rows for bits, rows in widths.items() if any("Q" in one.arms for one in rows)}
    q = [mean_share(rows, "Q", "attack_success") for rows in patched.values()]
    panel.plot(list(patched), q, marker="x", markersize=4, linewidth=1, color=paint, linestyle="--")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def save_svg(figure: Any, file: Path) -> None:
    """Write a figure so that equal figures are equal bytes, and close it."""
    plt.rcParams.update({"svg.hashsalt": "qresafe", "svg.fonttype": "none"})
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
