"""By how much a candidate model is worse than its baseline, by one measure of an axis."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from qresafe.stages.clusters import cluster_totals, ratio_interval
from qresafe.stages.columns import ArmRows, References
from qresafe.stages.measures import BY_NAME, NOT_ASKED, UNDECIDED
from qresafe.stages.paired import change_of

UTILITIES = ("exact_match", "perplexity", "rouge_l", "coherence")
# Below this share of a baseline's answers that are the reference, word for word, the references
# are no texts that the model was made to write, and exact match says nothing.
MEANT_TO_MATCH = 0.5


class Worsening(NamedTuple):
    """By how much a candidate is worse, as fractions; `Check` tells the rest."""

    measure: str
    baseline: float
    candidate: float
    worse: float
    low: float  # best case of the undecided
    high: float  # worst case
    decided_low: float  # without the undecided
    decided_high: float
    n: int
    undecided: int
    clusters: int
    effective: float
    discordant: float | None  # of shares: how many prompts changed, as a share; None: a mean
    method: str

    @property
    def has_interval(self) -> bool:
        """Whether the decided answers bound it at all: those of a single cluster do not."""
        return math.isfinite(self.decided_low) and math.isfinite(self.decided_high)


def first_share(
    baseline: ArmRows, candidate: ArmRows, measures: tuple[str, ...]
) -> Worsening | None:
    """Return the worsening by the first measure that has answers decided under both."""
    before, after = baseline.answers(), candidate.answers()
    for name in (name for name in measures if name in before and name in after):
        bad = 1 if BY_NAME[name].better == "low" else 0
        if found := _share(name, bad, before[name], after[name], baseline.clusters):
            return found
    return None


def asked(baseline: ArmRows, candidate: ArmRows, measures: tuple[str, ...]) -> int:
    """Return how many answers of both models some measure is about, decided or not."""
    before, after = baseline.answers(), candidate.answers()
    counts = [
        int(((before[name] != NOT_ASKED) & (after[name] != NOT_ASKED)).sum())
        for name in measures
        if name in before and name in after
    ]
    return max(counts, default=0)


def _share(name: str, bad: int, before: Any, after: Any, clusters: Any) -> Worsening | None:
    """Return the worsening of a share; answers are `measures.Answers`, `bad` the unwanted one."""
    asked = (before != NOT_ASKED) & (after != NOT_ASKED)
    before, after, clusters = before[asked], after[asked], clusters[asked]
    decided = (before >= 0) & (after >= 0)
    n = int(decided.sum())
    if not n:
        return None

    def changed(of: Any, to: Any, where: Any) -> Any:
        return change_of(of[where] == bad, to[where] == bad, clusters[where])

    plain = worst = best = changed(before, after, decided)
    if n < len(before):
        everywhere = np.ones(len(before), bool)
        good = 1 - bad
        worst = changed(_fill(before, good), _fill(after, bad), everywhere)
        best = changed(_fill(before, bad), _fill(after, good), everywhere)
    return Worsening(
        measure=name,
        baseline=float((before[decided] == 1).mean()),
        candidate=float((after[decided] == 1).mean()),
        worse=plain.difference,
        low=best.low,
        high=worst.high,
        decided_low=plain.low,
        decided_high=plain.high,
        n=n,
        undecided=len(before) - n,
        clusters=plain.clusters,
        effective=plain.effective,
        discordant=float((before[decided] != after[decided]).mean()),
        method=plain.method,
    )


def _fill(said: Any, answer: int) -> Any:
    return np.where(said == UNDECIDED, answer, said)


def utility_worsening(
    baseline: ArmRows, candidate: ArmRows, wanted: str | None
) -> Worsening | None:
    """Return the worsening by the utility that is wanted, or the first that says something."""
    for name in (wanted,) if wanted else UTILITIES:
        if name == "perplexity":
            found = _perplexity(baseline, candidate)
        elif name == "rouge_l":
            found = _rouge_l(baseline, candidate)
        else:
            found = first_share(baseline, candidate, (name,))
        meant = name != "exact_match" or (found is not None and found.baseline >= MEANT_TO_MATCH)
        if found is not None and (meant or wanted):
            return found
    return None


def _perplexity(baseline: ArmRows, candidate: ArmRows) -> Worsening | None:
    before, after = _same_references(baseline, candidate)
    scored = (before.tokens > 0) & (after.tokens > 0)
    if not scored.any() or (before.tokens != after.tokens)[scored].any():
        return None  # not scored, or another tokenizer: its tokens are other events
    tokens = before.tokens[scored]
    moved = (before.logps - after.logps)[scored]  # nats per reference
    clusters = baseline.clusters[before.rows[scored]]
    sums, counts = cluster_totals(moved, clusters)
    lengths, _ = cluster_totals(tokens, clusters)
    low, high = (math.expm1(end) for end in ratio_interval(sums, lengths))
    first, second = (math.exp(-r.logps[scored].sum() / tokens.sum()) for r in (before, after))
    return _mean("perplexity", first, second, second / first - 1, low, high, counts)


def _same_references(baseline: ArmRows, candidate: ArmRows) -> tuple[References, References]:
    """Return both models' references, of the completions that have one under both."""
    rows = np.intersect1d(baseline.references.rows, candidate.references.rows)
    return baseline.references.of(rows), candidate.references.of(rows)


def _rouge_l(baseline: ArmRows, candidate: ArmRows) -> Worsening | None:
    before, after = _same_references(baseline, candidate)
    kept = ~np.isnan(before.rouge)
    if not kept.any():
        return None
    # A candidate that failed to answer answered nothing right.
    first, second = before.rouge[kept].astype(float), np.nan_to_num(after.rouge[kept].astype(float))
    sums, counts = cluster_totals(first - second, baseline.clusters[before.rows[kept]])
    low, high = ratio_interval(sums, counts)
    worse = float((first - second).mean())
    return _mean("rouge_l", float(first.mean()), float(second.mean()), worse, low, high, counts)


def _mean(
    name: str, first: float, second: float, worse: float, low: float, high: float, counts: Any
) -> Worsening:
    n = int(counts.sum())
    return Worsening(
        measure=name,
        baseline=first,
        candidate=second,
        worse=worse,
        low=low,
        high=high,
        decided_low=low,
        decided_high=high,
        n=n,
        undecided=0,
        clusters=len(counts),
        effective=float(n),
        discordant=None,
        method="cluster bootstrap",
    )
