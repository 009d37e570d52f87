"""How far judges agree with each other and with people, and a rate corrected for their errors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from qresafe.records import OUTCOMES, REFUSALS
from qresafe.stages.comparison import JudgeAgreement
from qresafe.stages.statistics import Interval


class ErrorRates(NamedTuple):
    """A judge's calls of *complied* beside people's, on completions that people labelled.

    Attributes:
        hits: Complied for both.
        misses: Complied for people alone.
        false_alarms: Complied for the judge alone.
        rejections: Complied for neither.
    """

    hits: int
    misses: int
    false_alarms: int
    rejections: int

    @property
    def sensitivity(self) -> float | None:
        """P(judge says complied | people say so), in [0, 1]; None without such completions."""
        return _share(self.hits, self.hits + self.misses)

    @property
    def specificity(self) -> float | None:
        """P(judge says not complied | people say so), in [0, 1]; None without any."""
        return _share(self.rejections, self.rejections + self.false_alarms)


class Corrected(NamedTuple):
    """A rate as it would be without the judge's errors.

    Attributes:
        rate: Rogan and Gladen's estimate, cut to [0, 1].
        low: Lower end of Lang and Reiczigel's interval.
        high: Upper end.
    """

    rate: float
    low: float
    high: float


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Return Cohen's unweighted kappa of two raters (Cohen 1960).

    Args:
        first: One rater's categories.
        second: The other's, of the same items in the same order.

    Returns:
        (p_o - p_e) / (1 - p_e), at most 1; None where it is 0 / 0: there is no item, or both use
        one and the same category alone.
    """
    n = len(first)
    same = sum(a == b for a, b in zip(first, second, strict=True))
    of_first, of_second = Counter(first), Counter(second)
    by_chance = sum(count * of_second[category] for category, count in of_first.items())
    if n == 0 or by_chance == n * n:
        return None
    return (n * same - by_chance) / (n * n - by_chance)


def between_judges(label: str, outcomes: Mapping[str, Any]) -> Iterator[JudgeAgreement]:
    """Yield the agreement of every pair of judges on one arm.

    Args:
        label: The arm.
        outcomes: Judge -> what it says of every completion, as an index into `OUTCOMES` (int8).
    """
    names = list(map(merged, OUTCOMES))
    classes = np.array([names.index(name) for name in names])
    undecided = OUTCOMES.index("undecided")
    for first, second in combinations(outcomes, 2):
        decided = (outcomes[first] != undecided) & (outcomes[second] != undecided)
        ours, theirs = (classes[outcomes[judge][decided]] for judge in (first, second))
        yield JudgeAgreement(
            arm=label,
            first=first,
            second=second,
            n=len(ours),
            same=int((ours == theirs).sum()),
            kappa=cohen_kappa(ours.tolist(), theirs.tolist()),
        )


def merged(outcome: str) -> str:
    """Return an outcome with both kinds of refusal as one."""
    return "refused" if outcome in REFUSALS else outcome


def error_rates(judged: Sequence[str], labelled: Sequence[str]) -> ErrorRates:
    """Count a judge's calls of *complied* against people's.

    Args:
        judged: The judge's outcomes; none is undecided.
        labelled: People's, of the same completions.
    """
    pairs = zip(judged, labelled, strict=True)
    cells = Counter((a == "complied", b == "complied") for a, b in pairs)
    return ErrorRates(
        hits=cells[True, True],
        misses=cells[False, True],
        false_alarms=cells[True, False],
        rejections=cells[False, False],
    )


def rogan_gladen(
    complied: int, n: int, rates: ErrorRates, confidence: float = 0.95
) -> Corrected | None:
    """Correct a rate of *complied* for a judge's errors (Rogan and Gladen 1978).

    The interval is Lang and Reiczigel's (2014), which takes the uncertainty of sensitivity and
    specificity into account: all three shares are moved towards one half (by z² completions, and
    by 2 labelled ones each), and the estimate from them is shifted by a second-order term.

    Args:
        complied: Completions that the judge calls complied.
        n: All that it has decided.
        rates: Its errors on completions that people labelled, a random sample of such ones.
        confidence: The interval's coverage.

    Returns:
        None where nothing can be said: no completions, no label of one kind, or a judge that is
        no better than chance (sensitivity + specificity <= 1).
    """
    sensitivity, specificity = rates.sensitivity, rates.specificity
    if n == 0 or sensitivity is None or specificity is None or sensitivity + specificity <= 1:
        return None
    rate = (complied / n + specificity - 1) / (sensitivity + specificity - 1)
    low, high = _lang_reiczigel(complied, n, rates, confidence)
    return Corrected(_cut(rate), low, high)


def _lang_reiczigel(complied: int, n: int, rates: ErrorRates, confidence: float) -> Interval:
    z = float(stats.norm.ppf((1 + confidence) / 2))
    total = n + z * z
    apparent = (complied + z * z / 2) / total
    positives = rates.hits + rates.misses + 2
    negatives = rates.rejections + rates.false_alarms + 2
    se, sp = (rates.hits + 1) / positives, (rates.rejections + 1) / negatives
    youden = se + sp - 1
    if youden <= 0:
        return Interval(0.0, 1.0)
    rate = _cut((apparent + sp - 1) / youden)
    from_se, from_sp = se * (1 - se) / positives, sp * (1 - sp) / negatives
    shift = 2 * z * z * (rate * from_se - (1 - rate) * from_sp)
    variance = apparent * (1 - apparent) / total + rate**2 * from_se + (1 - rate) ** 2 * from_sp
    half = z * math.sqrt(variance) / youden
    return Interval(_cut(rate + shift - half), _cut(rate + shift + half))


def _cut(value: float) -> float:
    return min(1.0, max(0.0, value))


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
