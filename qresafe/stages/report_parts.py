"""What a report shows beside its main table, where it is there: parts, attacks, judges, leaks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from qresafe.stages.comparison import ArmResult, Attack, AttackConfiguration, Comparison, Share
from qresafe.stages.measures import (
    ATTACK,
    BY_NAME,
    COMPLIANCE,
    EXACT_MATCH,
    OVER_REFUSAL,
    Measure,
)
from qresafe.stages.narrative import interval, percent
from qresafe.stages.plots import heat_plot
from qresafe.stages.report_view import Panel, short

SPLIT_MEASURES = (COMPLIANCE, ATTACK, OVER_REFUSAL, EXACT_MATCH)
SPLITS = {"by_category": "category", "by_language": "language"}
# Categories with fewer answers say little: their rows are greyed.
FEW = 20


class PartRow(NamedTuple):
    """One category or language."""

    name: str
    n: str
    cells: list[str]
    intervals: list[str]
    few: bool


class Part(NamedTuple):
    """A measure, split."""

    title: str
    note: str
    rows: list[PartRow]


def parts(comparison: Comparison) -> list[Part]:
    """Return a table for each split and each of the measures that it can be asked of."""
    found = []
    for name, word in SPLITS.items():
        for measure in SPLIT_MEASURES:
            if measure is ATTACK and COMPLIANCE.name in comparison.arms[0].measures:
                continue  # the same prompts, by the better judge
            rows = _part_rows(comparison, name, measure)
            if len(rows) > 1:
                title = f"{measure.title[0].upper()}{measure.title[1:]} by {word}"
                found.append(Part(title, measure.meaning, rows))
    return found


def _part_rows(comparison: Comparison, split: str, measure: Measure) -> list[PartRow]:
    rows = []
    for name in sorted(_split(comparison.arms[0], split)):
        shares = [_split(arm, split).get(name, {}).get(measure.name) for arm in comparison.arms]
        known = [share for share in shares if share is not None]
        if not known:
            continue
        sizes = sorted({share.n for share in known})
        n = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]}–{sizes[-1]}"
        cells = [percent(share.share) if share else "–" for share in shares]
        ends = [interval(share) if share else "" for share in shares]
        rows.append(PartRow(name, n, cells, ends, sizes[0] < FEW))
    return rows


def _split(arm: ArmResult, split: str) -> Mapping[str, Mapping[str, Share]]:
    found: Mapping[str, Mapping[str, Share]] = getattr(arm, split)
    return found


def attacks(comparison: Comparison) -> list[Panel]:
    """Return a heat map for each family of decoding settings: arms by setting."""
    families = dict.fromkeys(
        one.family or one.name for attack in comparison.attacks for one in attack.configurations
    )
    return [_heat(comparison.attacks, family) for family in families]


def _heat(given: list[Attack], family: str) -> Panel:
    of_family = [
        [one for one in attack.configurations if (one.family or one.name) == family]
        for attack in given
    ]
    columns = list(dict.fromkeys(_setting(one) for some in of_family for one in some))
    cells = {
        (row, columns.index(_setting(one))): one.share.share or 0.0
        for row, some in enumerate(of_family)
        for one in some
    }
    rows = [short(attack.label) for attack in given]
    setting = family.replace("_", "-")
    svg = heat_plot(f"attack by {setting}", rows, columns, cells, x_label=setting, darkest=1.0)
    title = f"{BY_NAME[given[0].measure].title} under {setting}"
    return Panel(title, "per cent of prompts, one decoding each", svg)


def _setting(one: AttackConfiguration) -> str:
    return one.value or one.name


def worst_cases(comparison: Comparison) -> list[tuple[str, str, str, str]]:
    """Return (arm, worst single configuration, share of it, any configuration) of each attack."""
    rows = []
    for attack in comparison.attacks:
        best = max(attack.configurations, key=lambda one: one.share.share or 0.0, default=None)
        if best is None:
            continue
        any_of = percent(attack.worst.share) if attack.worst else "–"
        rows.append((short(attack.label), best.name, percent(best.share.share), any_of))
    return rows


def at_k(comparison: Comparison) -> list[tuple[str, str, int, int, str, str]]:
    """Return (arm, measure, k, prompts, share, interval) of ASR@k."""
    return [
        (
            short(arm.label),
            BY_NAME[one.measure].title,
            one.k,
            one.n,
            percent(one.share),
            f"{100 * one.low:.1f}–{100 * one.high:.1f}",
        )
        for arm in comparison.arms
        for one in arm.at_k
    ]


def agreement(comparison: Comparison) -> list[tuple[str, str, int, str, str]]:
    """Return (arm, judges, n, observed agreement, Cohen's kappa) of each pair of judges."""
    rows = []
    for one in comparison.agreement:
        kappa = "–" if one.kappa is None else f"{one.kappa:.2f}"
        if one.low is not None and one.high is not None:
            kappa += f" ({one.low:.2f}–{one.high:.2f})"
        arm = short(one.label) if one.label else "all"
        rows.append((arm, f"{one.first}, {one.second}", one.n, percent(one.observed), kappa))
    return rows


def contamination(comparison: Comparison) -> str:
    """Return what was found of calibration prompts among the evaluation's; "" if not looked for."""
    found = comparison.contamination
    if found is None:
        return ""
    return (
        f"Of {found.calibration:,} calibration prompts, {found.exact:,} are evaluation prompts "
        f"(of {found.evaluation:,}) and {found.near:,} nearly are; {found.dropped:,} were left out."
    )
