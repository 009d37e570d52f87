"""What people's labels say of judges: confusion, kappa, error rates and corrected rates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations

from pydantic import BaseModel, ConfigDict

from qresafe.artifacts import Artifact
from qresafe.records import Outcome
from qresafe.stages.agreement import (
    ErrorRates,
    cohen_kappa,
    error_rates,
    merged,
    rogan_gladen,
)
from qresafe.stages.comparison import Share
from qresafe.stages.generate import FILE as COMPLETIONS
from qresafe.stages.judge import FILE as VERDICTS
from qresafe.stages.label_sheet import Key, Labels
from qresafe.stages.runtime import Row, read_table
from qresafe.stages.statistics import wilson

METHOD = "Rogan-Gladen, interval of Lang and Reiczigel"
Said = tuple[Sequence[Row], Mapping[str, Sequence[Outcome]]]  # completions, judge -> outcomes


class Reported(BaseModel):
    """Immutable data of the result."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class BetweenPeople(Reported):
    """Two people on the completions that both labelled; both kinds of refusal are one class."""

    first: str
    second: str
    n: int
    same: int
    kappa: float | None


class CorrectedRate(Reported):
    """A judge's compliance rate on all completions of a source and axis.

    Attributes:
        source: Label of the completions.
        axis: The prompts' axis.
        raw: As the judge says, with Wilson's interval.
        rate: Corrected for the judge's errors (`METHOD`); None where the labels do not allow it.
        low: Lower end of its 95 % interval.
        high: Upper end.
    """

    source: str
    axis: str
    raw: Share
    rate: float | None
    low: float | None
    high: float | None


class JudgeError(Reported):
    """One judge beside people.

    Attributes:
        judge: Its name.
        confusion: People's label -> judge's outcome -> count.
        kappa: Cohen's, with both kinds of refusal as one class; undecided left out.
        sensitivity: Of the judge's *complied*.
        specificity: Likewise.
        undecided: Labelled completions that the judge leaves undecided.
        corrected: The rates, by source and axis.
    """

    judge: str
    confusion: dict[str, dict[str, int]]
    kappa: float | None
    sensitivity: Share
    specificity: Share
    undecided: int
    corrected: list[CorrectedRate]


class SheetResult(Reported):
    """All that a labelled sheet shows.

    Attributes:
        labelled: Completions that somebody labelled.
        tied: Those on which people disagree without a majority; they are used nowhere.
        people: Every pair of people.
        judges: Every judge.
        method: How rates are corrected.
    """

    labelled: int
    tied: int
    people: list[BetweenPeople]
    judges: list[JudgeError]
    method: str = METHOD


def evaluate_sheet(labels: Labels, key: Key, sources: Mapping[str, Said]) -> SheetResult:
    """Compare judges with people.

    Args:
        labels: The sheet, read.
        key: Its key.
        sources: Label of `key.sources` -> completions and every judge's outcomes on them.
    """
    agreed = labels.consensus()
    judges = list(next(iter(sources.values()))[1])
    return SheetResult(
        labelled=len(labels.ids()),
        tied=len(labels.ids()) - len(agreed),
        people=[_between(labels, pair) for pair in combinations(labels.people, 2)],
        judges=[_judge_error(judge, agreed, key, sources) for judge in judges],
    )


def read_said(completions: Artifact, verdicts: Artifact) -> Said:
    """Read completions, and what each judge said of them in the same order."""
    rows = read_table(completions.path / COMPLETIONS).to_pylist()
    told = read_table(verdicts.path / VERDICTS).to_pylist()
    found = {(v["judge"], v["prompt_id"], v["sample"]): v["outcome"] for v in told}
    judges = dict.fromkeys(judge for judge, _, _ in found)
    return rows, {j: [found[j, row["prompt_id"], row["sample"]] for row in rows] for j in judges}


def _between(labels: Labels, pair: tuple[str, str]) -> BetweenPeople:
    first, second = (labels.people[person] for person in pair)
    both = [name for name in first if name in second]
    ours, theirs = ([merged(said[name]) for name in both] for said in (first, second))
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    kappa = cohen_kappa(ours, theirs)
    return BetweenPeople(first=pair[0], second=pair[1], n=len(both), same=same, kappa=kappa)


def _judge_error(
    judge: str, agreed: Mapping[str, str], key: Key, sources: Mapping[str, Said]
) -> JudgeError:
    said = {
        (source, row["prompt_id"], row["sample"]): outcome
        for source, (rows, outcomes) in sources.items()
        for row, outcome in zip(rows, outcomes[judge], strict=True)
    }
    pairs = []
    for name, label in agreed.items():
        item = key.items[name]
        pairs.append((label, said[item.source, item.prompt_id, item.sample]))
    decided = [(a, b) for a, b in pairs if b != "undecided"]
    people, machine = [merged(a) for a, _ in decided], [merged(b) for _, b in decided]
    rates = error_rates(machine, people)
    corrected = [
        _corrected(source, axis, raw, rates)
        for source, (rows, outcomes) in sources.items()
        for axis, raw in _raw_rates(rows, outcomes[judge]).items()
    ]
    return JudgeError(
        judge=judge,
        confusion=_confusion(pairs),
        kappa=cohen_kappa(people, machine),
        sensitivity=_share(rates.hits, rates.hits + rates.misses),
        specificity=_share(rates.rejections, rates.rejections + rates.false_alarms),
        undecided=len(pairs) - len(decided),
        corrected=corrected,
    )


def _corrected(source: str, axis: str, raw: Share, rates: ErrorRates) -> CorrectedRate:
    rate, low, high = rogan_gladen(raw.yes, raw.n, rates) or (None, None, None)
    return CorrectedRate(source=source, axis=axis, raw=raw, rate=rate, low=low, high=high)


def _raw_rates(rows: Sequence[Row], outcomes: Sequence[Outcome]) -> dict[str, Share]:
    tally = Counter((row["axis"], said) for row, said in zip(rows, outcomes, strict=True))
    found = {}
    for axis in dict.fromkeys(row["axis"] for row in rows):
        in_all = sum(count for (where, _), count in tally.items() if where == axis)
        undecided = tally[axis, "undecided"]
        found[axis] = _share(tally[axis, "complied"], in_all - undecided, undecided)
    return found


def _confusion(pairs: Sequence[tuple[str, str]]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for (label, outcome), count in sorted(Counter(pairs).items()):
        found.setdefault(label, {})[outcome] = count
    return found


def _share(yes: int, n: int, undecided: int = 0) -> Share:
    low, high = wilson(yes, n)
    share = yes / n if n else None
    return Share(yes=yes, n=n, share=share, low=low, high=high, undecided=undecided)
