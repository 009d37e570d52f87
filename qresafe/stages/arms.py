"""The arms of an experiment, and what is found of them and between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qresafe.errors import DataError
from qresafe.records import OUTCOMES
from qresafe.stages.agreement import between_judges
from qresafe.stages.clusters import at_k, ratio_interval, share_interval
from qresafe.stages.columns import ArmRows
from qresafe.stages.comparison import (
    ArmResult,
    AtK,
    Attribution,
    Comparison,
    FlipResult,
    OutcomeCounts,
    Share,
    Utility,
)
from qresafe.stages.measures import AXES, NOT_ASKED, Answers, roles
from qresafe.stages.paired import change_of
from qresafe.stages.statistics import (
    holm,
    mcnemar,
    mean_interval,
    minimum_detectable_effect,
    paired_flips,
    wilson,
)
from qresafe.stages.utility import perplexity

# The arms of an experiment: full precision, its fine-tuned control, quantized, patched, and the
# patched model before rounding (its high-precision adapter).
W, CONTROL, Q0, Q, ADAPTER = "W", "control", "Q0", "Q", "adapter"
STEPS = ((W, Q0), (Q0, Q), (W, Q), (W, CONTROL), (CONTROL, Q0), (ADAPTER, Q))
MOST_PARTS = 60  # categories or languages; more of them are names, not parts
KS = (1, 2, 5, 10, 20, 50, 100)  # of ASR@k


def compare_arms(arms: Sequence[ArmRows], steps: Sequence[tuple[str, str]]) -> Comparison:
    """Compare arms that have been read.

    Args:
        arms: At least one.
        steps: Pairs of labels whose flips are counted.

    Raises:
        DataError: The arms did not answer the same prompts.
    """
    arms = [arm.aligned(arms[0]) for arm in arms]
    said = {arm.label: arm.answers() for arm in arms}
    results = [_arm_result(arm, said[arm.label]) for arm in arms]
    return Comparison(
        judges=roles(list(arms[0].outcomes)),
        prompts=_prompts(arms[0]),
        samples=1 + int(arms[0].samples.max()),
        cluster=cluster_kind(arms[0]),
        arms=results,
        flips=_flips(said, arms[0].clusters, steps),
        attribution=_attribution({result.label: result for result in results}),
        agreement=[found for arm in arms for found in between_judges(arm.label, arm.outcomes)],
    )


def cluster_kind(arm: ArmRows) -> str:
    """Return what an arm's clusters are: "phrase", "prompt", or "" where each row stands alone."""
    if len(np.unique(arm.clusters)) == len(arm.clusters):
        return ""
    return "prompt" if np.array_equal(arm.clusters, arm.prompts) else "phrase"


def _prompts(arm: ArmRows) -> dict[str, dict[str, int]]:
    labels = arm.splits["benchmark"]
    found: dict[str, dict[str, int]] = {}
    for axis in _axes(arm):
        asked = (arm.axes == AXES.index(axis)) & (arm.samples == 0)
        counts = {name: int((asked & labels.where(name)).sum()) for name in labels.names}
        found[axis] = {name: count for name, count in counts.items() if count}
    return found


def _axes(arm: ArmRows) -> list[str]:
    codes, first = np.unique(arm.axes, return_index=True)
    return [AXES[code] for code in codes[np.argsort(first)]]


def _arm_result(arm: ArmRows, said: Mapping[str, Answers]) -> ArmResult:
    return ArmResult(
        label=arm.label,
        counts=list(_counts(arm)),
        measures=_shares(arm, said),
        by_benchmark=_by(arm, "benchmark"),
        by_category=_by(arm, "category"),
        by_language=_by(arm, "lang"),
        utility=utility_of(arm),
        at_k=list(_at_k(arm, said)),
    )


def _by(arm: ArmRows, column: str) -> dict[str, dict[str, Share]]:
    if len(arm.splits[column].names) > MOST_PARTS:
        return {}
    parts = arm.parts(column).items()
    return {name: _shares(part, part.answers()) for name, part in parts}


def _shares(arm: ArmRows, said: Mapping[str, Answers]) -> dict[str, Share]:
    return {name: share_of(found, arm.clusters) for name, found in said.items()}


def _counts(arm: ArmRows) -> Iterator[OutcomeCounts]:
    for judge, outcomes in arm.outcomes.items():
        for axis in _axes(arm):
            here = outcomes[arm.axes == AXES.index(axis)]
            tally = np.bincount(here, minlength=len(OUTCOMES)).tolist()
            named = dict(zip(OUTCOMES, tally, strict=True))
            yield OutcomeCounts(judge=judge, axis=axis, n=len(here), **named)


def share_of(found: Answers, clusters: Any) -> Share:
    """Return the share of yes among the decided answers, with its intervals.

    Args:
        found: The answers of an arm (`measures.Answers`).
        clusters: The cluster of each.
    """
    decided = found >= 0
    yes, n = int((found == 1).sum()), int(decided.sum())
    low, high = wilson(yes, n)
    share = Share(
        yes=yes,
        n=n,
        share=yes / n if n else None,
        low=low,
        high=high,
        undecided=int((found != NOT_ASKED).sum()) - n,
    )
    kinds = len(np.unique(clusters[decided]))
    if kinds == n:
        return share
    low, high = share_interval(found[decided], clusters[decided])
    return share.model_copy(update={"clusters": kinds, "cluster_low": low, "cluster_high": high})


def _at_k(arm: ArmRows, said: Mapping[str, Answers]) -> Iterator[AtK]:
    if not arm.samples.max(initial=0):
        return
    for name in ("attack_success", "compliance"):
        if name in said:
            yield from _at_each_k(arm, name, said[name])


def _at_each_k(arm: ArmRows, name: str, found: Answers) -> Iterator[AtK]:
    decided = found >= 0
    _, first, place = np.unique(arm.prompts[decided], return_index=True, return_inverse=True)
    n = np.bincount(place)
    yes = np.bincount(place, weights=found[decided] == 1)
    clusters = arm.clusters[decided][first]
    for k in KS:
        enough = n >= k
        if not enough.any() or k > n.max():
            return
        chances = at_k(yes[enough], n[enough], k)
        low, high = share_interval(chances, clusters[enough], least=0.0)
        share = float(chances.mean())
        yield AtK(measure=name, k=k, n=int(enough.sum()), share=share, low=low, high=high)


def utility_of(arm: ArmRows) -> Utility | None:
    """Return ROUGE-L and perplexity on benign prompts with a reference; None without any."""
    found = arm.references
    kept = ~np.isnan(found.rouge)
    scores = found.rouge[kept].astype(float)
    if not len(scores):
        return None
    clusters = arm.clusters[found.rows[kept]]
    _, places = np.unique(clusters, return_inverse=True)
    sums, counts = np.bincount(places, weights=scores), np.bincount(places)
    alone = len(sums) == len(scores)
    low, high = mean_interval(scores) if alone else ratio_interval(sums, counts)
    scored = found.tokens > 0
    return Utility(
        n=len(scores),
        rouge_l=float(scores.mean()),
        rouge_l_low=max(0.0, low),
        rouge_l_high=min(1.0, high),
        perplexity=perplexity(found.logps[scored].tolist(), found.tokens[scored].tolist()),
        target_tokens=int(found.tokens[scored].sum()),
    )


def _flips(
    said: Mapping[str, Mapping[str, Answers]], clusters: Any, steps: Sequence[tuple[str, str]]
) -> list[FlipResult]:
    found = [
        _flip(before, after, name, said[before][name], said[after][name], clusters)
        for before, after in steps
        for name in said[before]
        if name in said[after]
    ]
    corrected = holm([flip.p for flip in found])
    return [flip.model_copy(update={"p_holm": p}) for flip, p in zip(found, corrected, strict=True)]


def _flip(
    before: str, after: str, name: str, first: Answers, second: Answers, clusters: Any
) -> FlipResult:
    both = (first >= 0) & (second >= 0)
    flips = paired_flips(first, second)
    p = mcnemar(flips.gained, flips.lost)
    shown = FlipResult(
        before=before,
        after=after,
        measure=name,
        **flips._asdict(),
        p=p,
        p_holm=p,
        detectable=1.0,
    )
    if not shown.n:
        return shown
    change = change_of(first[both], second[both], clusters[both])
    return shown.model_copy(
        update={
            "detectable": minimum_detectable_effect(int(change.effective)),
            **{key: getattr(change, key) for key in ("difference", "low", "high", "method")},
        }
    )


def _attribution(arms: Mapping[str, ArmResult]) -> list[Attribution]:
    if not {W, CONTROL, Q0} <= set(arms):
        return []
    found = []
    for name in arms[W].measures:
        full, control, low = (arms[label].measures[name].share for label in (W, CONTROL, Q0))
        if full is None or control is None or low is None:
            continue
        parts = {"fine_tuning": control - full, "precision": low - control}
        found.append(Attribution(measure=name, total=low - full, **parts))
    return found


def require_same(what: str, values: Mapping[str, object]) -> None:
    """Refuse to compare arms that differ in something.

    Args:
        what: What must agree, for the message.
        values: Label -> value; at least one. Of mappings, the keys that differ are named.

    Raises:
        DataError: A value differs from the first one.
    """
    first, *others = values
    for label in others:
        if values[label] != values[first]:
            told = difference(values[first], values[label])
            raise DataError(
                f"{first} and {label} were measured with different {what}{told}",
                where="the comparison",
                remedy="generate and judge all arms in the same way",
            )


def difference(first: object, second: object) -> str:
    """Return " (key: this against that)" for mappings, and nothing for other values."""
    if not (isinstance(first, Mapping) and isinstance(second, Mapping)):
        return ""
    keys = [key for key in {**first, **second} if first.get(key) != second.get(key)]
    told = [f"{key}: {first.get(key)!r} against {second.get(key)!r}" for key in keys[:3]]
    return f" ({'; '.join(told)})"
