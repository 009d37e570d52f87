"""The page of `bench.ablations`: a table and a plot per curve, groups, races, what is touched."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.ablations import Found, kept_at, plan
from bench.ablations_plots import curve_plot, races_plot, touched_plot
from bench.kept import between, write_rows
from bench.touched import overlaps, rank_agreement, touched_shares
from qresafe.stages.statistics import wilson

DOCS = Path(__file__).parents[1] / "docs"
MEASURES = {
    "attack_success": "attack success %",
    "over_refusal": "over-refusal %",
    "exact_match": "exact match %",
    "coherence": "coherence %",
}
SAFE = 0.02  # above W's attack success: where a race ends

Rows = Sequence[Found]


def write_page(found: Rows, planned: int, storage: str, name: str = "") -> None:
    """Write a plan's page, docs/results.md or results-NAME.md, its plots and its rows.

    Args:
        found: The results.
        planned: How many the plan has.
        storage: Where results and patch files lie.
        name: Of the plan; "": bench/ablations.yaml.
    """
    whole, stem = plan(name), f"results-{name}" if name else "results"
    rows = [one for one in found if one.cell]
    parts = [_head(rows, planned, len(found) - len(rows), name)]
    parts.append(_part("bases", "The models", rows))
    for part, curve in whole["curves"].items():
        own = [one for one in rows if one.row.part == part]
        if own:
            curve_plot(own, part, DOCS / f"{stem}-{part}.svg")
            picture = f"![{curve['title']}]({stem}-{part}.svg)"
            parts.append(f"{_part(part, curve['title'], rows)}\n\n{picture}")
    for part, group in whole["groups"].items():
        parts.append(_part(part, group["title"], rows))
    parts += [_races(rows), _touched(rows, storage), _refused(found)]
    page = DOCS / f"{stem}.md"
    page.write_text("\n\n".join(filter(None, parts)) + "\n")
    kept = [kept_at(storage, one.row) for one in found]
    write_rows({path.stem: json.loads(path.read_text()) for path in kept if path.exists()},
               page.with_suffix(".jsonl"))  # fmt: skip
    print(f"wrote {page} from {len(found)} of {planned} results")


def _head(rows: Rows, planned: int, refused: int, name: str) -> str:
    command = "python -m bench.ablations" + (f" --plan {name}" if name else "")
    seeds = ", ".join(str(seed) for seed in sorted({one.row.seed for one in rows}))
    machines = "; ".join(sorted({one.hardware for one in rows}))
    when = between(one.day for one in rows)
    n = next(one.cell.n["attack_success"] for one in rows if one.cell)
    some = f" {len(rows) + refused} of the plan's {planned} results"
    some += f", of which {refused} are refusals." if refused else "."
    return (
        "# Ablations of the patch, embedded model\n\n"
        f"Made by `{command}`, measured {when}; {machines}. Seeds "
        f"{seeds}; test split, {n} harmful prompts a seed.{some} Q0 is LLM-QAT INT4, fine-tuned "
        "at risk III, where nothing else is said; every model is reloaded from disk. Shares in %: "
        "mean over seeds, per seed in round brackets, in square brackets the 95 % Wilson interval "
        "of all seeds' prompts "
        "together, which take prompts for independent: the borderline ones are wordings of 40 "
        "phrases, so over-refusal is known less well than its figures look. `codes` are the codes "
        "changed in %, `s` the seconds of training on the device that is named, with other rows "
        "beside it: not to be compared. What the figures say is "
        "in [findings.md](findings.md)."
    )


def _part(name: str, title: str, rows: Rows) -> str:
    own = [one for one in rows if one.row.part == name]
    if not own:
        return ""
    head = ["", *MEASURES.values(), "codes %", "s", "seeds"]
    lines = [f"## {title}\n", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += [_line(label, of_label) for label, of_label in by_label(own).items()]
    return "\n".join(lines)


def by_label(rows: Iterable[Found]) -> dict[str, list[Found]]:
    """Return label -> its rows, one for each seed, in the order of the plan."""
    found: dict[str, list[Found]] = {}
    for one in rows:
        found.setdefault(one.row.label, []).append(one)
    return found


def _line(label: str, rows: Rows) -> str:
    cells = [_share(rows, name, interval=name == "attack_success") for name in MEASURES]
    cells.append(_mean(rows, lambda cell: cell.codes_changed, 100, 2))
    cells += [_mean(rows, lambda cell: cell.seconds, 1, 0), str(len(rows))]
    return "| " + " | ".join([label, *cells]) + " |"


def _share(rows: Rows, measure: str, interval: bool) -> str:
    known = [(one.cell.measures.get(measure), one.cell.n.get(measure, 0)) for one in rows
             if one.cell]  # fmt: skip
    shares = [(share, n) for share, n in known if share is not None]
    if not shares:
        return "–"
    each = "/".join(f"{100 * share:.1f}" for share, _ in shares)
    text = f"{100 * sum(share for share, _ in shares) / len(shares):.1f}"
    text += f" ({each})" if len(shares) > 1 else ""
    if interval:
        yes, n = sum(round(share * n) for share, n in shares), sum(n for _, n in shares)
        bounds = wilson(yes, n)
        text += f" [{100 * bounds.low:.1f}, {100 * bounds.high:.1f}]"
    return text


def _mean(rows: Rows, get: Callable[[Any], float | None], scale: float, digits: int) -> str:
    known = [scale * value for one in rows if (value := get(one.cell)) is not None]
    return f"{sum(known) / len(known):.{digits}f}" if known else "–"


def _races(rows: Rows) -> str:
    """Say how long each way trains until the probe's attack success is W's + 2 points."""
    own = by_label(one for one in rows if one.row.part == "races")
    if not own:
        return ""
    races_plot(own, DOCS / "results-races.svg")
    head = ["", "first: step", "s", "highest after it % (step)", "to stay: step", "s", "at end %"]
    head.append("s per step")
    lines = [
        "## Time to safety\n",
        "Training until the attack success of 120 development prompts, looked at every 5 steps, is "
        "at most W's on the same prompts + 2 points: for the first time, how far it rises again, "
        "and from where on it stays; seconds of steps and masks. Same data, batch and learning "
        "rate; all through the grid. Per seed.\n",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
        *(f"| {label} | {' | '.join(_race(of_label))} |" for label, of_label in own.items()),
        "\n![attack success while training](results-races.svg)",
    ]
    return "\n".join(lines)


def _race(rows: Rows) -> list[str]:
    known = [(one.curve, one.safe + SAFE) for one in rows if one.safe is not None]
    first = [reached(curve, bound, stays=False) for curve, bound in known]
    stays = [reached(curve, bound) for curve, bound in known]
    above = [_highest(curve, look) for (curve, _), look in zip(known, first, strict=True)]
    return [
        "/".join(texts)
        for texts in (
            [f"{look[0]:.0f}" if look else "never" for look in first],
            [f"{look[1]:.1f}" if look else "never" for look in first],
            [f"{100 * look[2]:.0f} ({look[0]:.0f})" if look else "–" for look in above],
            [f"{look[0]:.0f}" if look else "never" for look in stays],
            [f"{look[1]:.1f}" if look else "never" for look in stays],
            [f"{100 * curve[-1][2]:.1f}" for curve, _ in known],
            [f"{curve[-1][1] / curve[-1][0]:.2f}" for curve, _ in known],
        )
    ]


def _highest(
    curve: Sequence[Sequence[float]], first: Sequence[float] | None
) -> Sequence[float] | None:
    after = [look for look in curve if first and look[0] > first[0]]
    return max(after, key=lambda look: look[2]) if after else None


def reached(
    curve: Sequence[Sequence[float]], bound: float, stays: bool = True
) -> Sequence[float] | None:
    """Return the first look from which on (or at which) attack success is at most `bound`.

    Args:
        curve: [step, seconds, attack success] of each look.
        bound: A share.
        stays: Whether all later looks must hold it too.
    """
    for index, look in enumerate(curve):
        after = curve[index:] if stays else curve[index : index + 1]
        if all(later[2] <= bound for later in after):
            return look
    return None


def _touched(rows: Rows, storage: str) -> str:
    """Say which layers a patch changes, and how far two patches change the same codes."""
    files = {
        (one.row.label, one.row.seed): path
        for one in rows
        if one.row.part in ("masks", "objectives", "tau", "baselines")
        and (path := kept_at(storage, one.row).with_suffix(".qpatch")).exists()
    }
    default = {seed: path for (label, seed), path in files.items() if label == "default"}
    if not default:
        return ""
    touched_plot(touched_shares(default.values()), DOCS / "results-touched.svg")
    head = "| patch | codes changed that the default changes too, % | by chance % |"
    lines = [
        "## What a patch touches\n",
        "Share of each projection's codes that the default patch changes, mean over seeds:\n",
        "![share of changed codes by projection and layer](results-touched.svg)\n",
        *_between_seeds(default.values()),
        "Of the codes that another patch of the same Q0 changes, how many the default patch "
        "changes as well (mean over seeds); by chance it would be the default's share of all "
        "codes.\n",
        head,
        "|---|---|---|",
    ]
    lines += [
        f"| {label} | {100 * share:.0f} | {100 * chance:.1f} |"
        for label, (share, chance) in _overlaps(files, default).items()
    ]
    return "\n".join(lines)


def _between_seeds(files: Iterable[Path]) -> list[str]:
    if (alike := rank_agreement(files)) is None:
        return []
    return [
        "Between seeds (each with a W of its own) the places that are changed most are the same "
        f"ones to this degree: Spearman's correlation of these shares, mean over pairs of seeds, "
        f"is {alike:.2f}.\n"
    ]


def _overlaps(
    files: Mapping[tuple[str, int], Path], default: Mapping[int, Path]
) -> dict[str, tuple[float, float]]:
    found: dict[str, tuple[float, float]] = {}
    for label in dict.fromkeys(label for label, _ in files if label != "default"):
        pairs = [(path, default[seed]) for (name, seed), path in files.items()
                 if name == label and seed in default]  # fmt: skip
        each = [one for pair in pairs if (one := overlaps(*pair))]
        if each:
            found[label] = (
                sum(share for share, _ in each) / len(each),
                sum(chance for _, chance in each) / len(each),
            )
    return found


def _refused(found: Rows) -> str:
    refused = [one for one in found if one.refused]
    if not refused:
        return ""
    lines = [f"- {one.row.part}, {one.row.label}, seed {one.row.seed}: {one.refused}"
             for one in refused]  # fmt: skip
    return "## Refused\n\n" + "\n".join(lines)
