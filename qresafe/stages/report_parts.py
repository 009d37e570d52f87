"""What a report shows beside its main table, where it is there: parts, attacks, judges, leaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qresafe.stages.comparison import (
    ArmResult,
    AtK,
    AttackCell,
    AttackMeasure,
    AttackResult,
    Comparison,
    Share,
)
from qresafe.stages.measures import (
    ATTACK,
    BY_NAME,
    COMPLIANCE,
    EXACT_MATCH,
    OVER_REFUSAL,
    Measure,
)
from qresafe.stages.narrative import interval, percent, reached
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
    names = sorted(_split(comparison.arms[0], split))
    benchmarks = {name.partition(": ")[0] for name in names}
    for name in names:
        shares = [_split(arm, split).get(name, {}).get(measure.name) for arm in comparison.arms]
        known = [share for share in shares if share is not None]
        if not known:
            continue
        sizes = sorted({share.n for share in known})
        n = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]}–{sizes[-1]}"
        cells = [percent(share.share) if share else "–" for share in shares]
        ends = [interval(share) if share else "" for share in shares]
        # The benchmark says something only where there are several.
        shown = name.partition(": ")[2] or name if len(benchmarks) == 1 else name
        rows.append(PartRow(shown, n, cells, ends, sizes[0] < FEW))
    return rows


def _split(arm: ArmResult, split: str) -> Mapping[str, Mapping[str, Share]]:
    found: Mapping[str, Mapping[str, Share]] = getattr(arm, split)
    return found


def attacks(comparison: Comparison) -> list[Panel]:
    """Return a heat map for each family of decoding settings: models and framings by setting."""
    names = [name for attack in comparison.attacks for name in attack.configurations]
    return [_heat(comparison.attacks, f) for f in dict.fromkeys(_setting(n)[0] for n in names)]


def _heat(given: list[AttackResult], family: str) -> Panel:
    shown = [(attack, main_measure(attack)) for attack in given if attack.measures]
    rows: dict[str, list[AttackCell]] = {}
    for attack, measure in shown:
        for cell in measure.cells:
            if _setting(cell.configuration)[0] == family:
                rows.setdefault(_row_name(attack, cell), []).append(cell)
    columns = list(
        dict.fromkeys(_setting(c.configuration)[1] for some in rows.values() for c in some)
    )
    cells = {
        (row, columns.index(_setting(cell.configuration)[1])): cell.share.share
        for row, some in enumerate(rows.values())
        for cell in some
        if cell.share.share is not None
    }
    setting = family.replace("_", "-")
    svg = heat_plot(
        f"attack by {setting}", list(rows), columns, cells, x_label=setting, darkest=1.0
    )
    title = f"{BY_NAME[shown[0][1].measure].title} under {setting}"
    return Panel(title, "per cent of answers to harmful prompts", svg)


def main_measure(attack: AttackResult) -> AttackMeasure:
    """Return the measure that an attack is told by: compliance, where the judges tell of it."""
    named = {measure.measure: measure for measure in attack.measures}
    return named.get(COMPLIANCE.name) or attack.measures[0]


def _row_name(attack: AttackResult, cell: AttackCell) -> str:
    alone = len(attack.framings) == 1
    return short(attack.label) if alone else f"{short(attack.label)}, {cell.framing}"


def _setting(configuration: str) -> tuple[str, str]:
    """Return the family and the value of a configuration such as "temperature 0.95"."""
    family, _, value = configuration.partition(" ")
    return family, value or family


def worst_cases(comparison: Comparison) -> list[tuple[str, str, str, str, str]]:
    """Return (model, framing, worst cell, share of it, share of any cell) of each attack.

    Of an attack with several framings there is a row for all of them, then one for each.
    """
    rows = []
    for attack in comparison.attacks:
        if not attack.measures:
            continue
        measure = main_measure(attack)
        if len(attack.framings) > 1:
            rows.append(_worst_row(attack, "any", measure.cells, measure.worst_case))
        for framing, any_of in measure.worst_case_by_framing.items():
            cells = [cell for cell in measure.cells if cell.framing == framing]
            rows.append(_worst_row(attack, framing, cells, any_of))
    return rows


def _worst_row(
    attack: AttackResult, framing: str, cells: Sequence[AttackCell], any_of: Share
) -> tuple[str, str, str, str, str]:
    worst = worst_cell(cells)
    if worst is None:
        return short(attack.label), framing, "–", "–", reached(any_of)
    several = len({cell.framing for cell in cells}) > 1
    name = f"{worst.framing}, {worst.configuration}" if several else worst.configuration
    share = percent(worst.share.share)
    return short(attack.label), framing, name, share, reached(any_of)


def worst_cell(cells: Sequence[AttackCell]) -> AttackCell | None:
    """Return the cell with the largest share; None if nothing is decided in any of them."""
    decided = [cell for cell in cells if cell.share.share is not None]
    return max(decided, key=lambda cell: cell.share.share or 0.0, default=None)


def at_k(comparison: Comparison) -> list[tuple[str, str, int, int, str, str]]:
    """Return (arm, measure, k, prompts, share, interval) of ASR@k.

    An attack shows it of its worst cell.
    """
    rows = [_at_k_row(arm.label, "", one) for arm in comparison.arms for one in arm.at_k]
    for attack in comparison.attacks:
        worst = worst_cell(main_measure(attack).cells) if attack.measures else None
        if worst is not None:
            where = f" under {worst.configuration}"
            where += f", {worst.framing}" if len(attack.framings) > 1 else ""
            rows += [_at_k_row(attack.label, where, one) for one in worst.at_k]
    return rows


def _at_k_row(label: str, where: str, found: AtK) -> tuple[str, str, int, int, str, str]:
    ends = f"{100 * found.low:.1f}–{100 * found.high:.1f}"
    measure = BY_NAME[found.measure].title + where
    return short(label), measure, found.k, found.n, percent(found.share), ends


def contamination(comparison: Comparison) -> str:
    """Return what was found of calibration prompts among the evaluation's; "" if not looked for."""
    found = comparison.contamination
    if found is None:
        return ""
    dropped = found.exact + found.near
    return (
        f"Of {found.calibration:,} calibration prompts, {found.exact:,} are evaluation prompts "
        f"(of {found.evaluation:,}) and {found.near:,} nearly are ({found.measure} of "
        f"{found.threshold:g} or more): {'they were left out' if dropped else 'none was dropped'}. "
        f"The highest similarity among those kept is {found.highest_kept:.2f}."
    )


def sources(comparison: Comparison) -> list[tuple[str, str, str, str, str]]:
    """Return (benchmark, title, licence, citation, repeats dropped) of each public prompt set."""
    return [
        (name, one.title, one.licence, one.citation, f"{one.repeats:,}")
        for name, one in comparison.sources.items()
    ]
