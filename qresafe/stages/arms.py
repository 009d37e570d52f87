"""The arms of an experiment, and what is found of them and between them."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from qresafe.errors import DataError
from qresafe.records import OUTCOMES, Outcome
from qresafe.stages.agreement import between_judges
from qresafe.stages.comparison import (
    ArmResult,
    Attribution,
    Comparison,
    FlipResult,
    OutcomeCounts,
    Share,
    Utility,
)
from qresafe.stages.measures import MEASURES, Answers, answers, roles
from qresafe.stages.runtime import Row
from qresafe.stages.statistics import (
    holm,
    mcnemar,
    mean_interval,
    minimum_detectable_effect,
    paired_flips,
    wilson,
)
from qresafe.stages.utility import perplexity, rouge_l

# The arms of an experiment: full precision, its fine-tuned control, quantized, patched, and the
# patched model before rounding (its high-precision adapter).
W, CONTROL, Q0, Q, ADAPTER = "W", "control", "Q0", "Q", "adapter"
STEPS = ((W, Q0), (Q0, Q), (W, Q), (W, CONTROL), (CONTROL, Q0), (ADAPTER, Q))


@dataclass(frozen=True)
class ArmRows:
    """One arm, read: completions, and outcomes by judge in the same order."""

    label: str
    completions: list[Row]
    outcomes: dict[str, list[Outcome]]

    @property
    def prompts(self) -> list[tuple[str, int]]:
        return [(row["prompt_id"], row["sample"]) for row in self.completions]

    def answers(self) -> dict[str, Answers]:
        """Return measure name -> the answers of this arm, where the measure can be asked."""
        named = roles(list(self.outcomes)).items()
        verdicts = {role: self.outcomes[judge] for role, judge in named}
        asked = {m.name: answers(m, self.completions, verdicts) for m in MEASURES}
        return {name: found for name, found in asked.items() if found is not None}

    def parts(self) -> dict[str, ArmRows]:
        """Return the arm split by benchmark; empty where there is only one."""
        places: dict[str, list[int]] = {}
        for index, row in enumerate(self.completions):
            places.setdefault(benchmark_of(row), []).append(index)
        return {
            name: ArmRows(
                self.label,
                [self.completions[i] for i in chosen],
                {judge: [said[i] for i in chosen] for judge, said in self.outcomes.items()},
            )
            for name, chosen in places.items()
            if len(places) > 1
        }


def benchmark_of(row: Row) -> str:
    """Return the benchmark that a completion's prompt comes from."""
    return row["benchmark"] or "prompts"


def compare_arms(arms: Sequence[ArmRows], steps: Sequence[tuple[str, str]]) -> Comparison:
    """Compare arms that have been read.

    Args:
        arms: At least one; all with the same prompts in the same order.
        steps: Pairs of labels whose flips are counted.
    """
    require_same("prompts", {arm.label: arm.prompts for arm in arms})
    said = {arm.label: arm.answers() for arm in arms}
    results = [_arm_result(arm, said[arm.label]) for arm in arms]
    first = arms[0].completions
    return Comparison(
        judges=roles(list(arms[0].outcomes)),
        prompts=_prompts(first),
        samples=1 + max(row["sample"] for row in first),
        arms=results,
        flips=_flips(said, steps),
        attribution=_attribution({result.label: result for result in results}),
        agreement=[found for arm in arms for found in between_judges(arm.label, arm.outcomes)],
    )


def _prompts(completions: Sequence[Row]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for row in completions:
        if row["sample"] == 0:
            axis = found.setdefault(row["axis"], {})
            axis[benchmark_of(row)] = axis.get(benchmark_of(row), 0) + 1
    return found


def _arm_result(arm: ArmRows, said: Mapping[str, Answers]) -> ArmResult:
    return ArmResult(
        label=arm.label,
        counts=list(_counts(arm)),
        measures={name: share_of(found) for name, found in said.items()},
        by_benchmark={
            name: {measure: share_of(found) for measure, found in part.answers().items()}
            for name, part in arm.parts().items()
        },
        utility=utility_of(arm.completions),
    )


def _counts(arm: ArmRows) -> Iterator[OutcomeCounts]:
    axes = list(dict.fromkeys(row["axis"] for row in arm.completions))
    for judge, outcomes in arm.outcomes.items():
        pairs = zip(arm.completions, outcomes, strict=True)
        tally = collections.Counter((row["axis"], outcome) for row, outcome in pairs)
        for axis in axes:
            named = {outcome: tally[axis, outcome] for outcome in OUTCOMES}
            yield OutcomeCounts(judge=judge, axis=axis, n=sum(named.values()), **named)


def share_of(found: Answers) -> Share:
    """Return the share of yes among the decided answers, with its interval."""
    decided = [answer for answer in found if answer is not None]
    yes, n = sum(decided), len(decided)
    low, high = wilson(yes, n)
    share = yes / n if n else None
    return Share(yes=yes, n=n, share=share, low=low, high=high, undecided=len(found) - n)


def utility_of(completions: Sequence[Row]) -> Utility | None:
    """Return ROUGE-L and perplexity on benign prompts with a reference; None without any."""
    rows = [row for row in completions if row["axis"] == "benign" and row["target"]]
    scores = [rouge_l(row["completion"], row["target"]) for row in rows if not row["error"]]
    if not scores:
        return None
    low, high = mean_interval(scores)
    scored = [row for row in rows if row["target_logp"] is not None and row["target_tokens"]]
    return Utility(
        n=len(scores),
        rouge_l=math.fsum(scores) / len(scores),
        rouge_l_low=low,
        rouge_l_high=high,
        perplexity=perplexity(
            (row["target_logp"] for row in scored), (row["target_tokens"] for row in scored)
        ),
        target_tokens=sum(row["target_tokens"] for row in scored),
    )


def _flips(
    said: Mapping[str, Mapping[str, Answers]], steps: Sequence[tuple[str, str]]
) -> list[FlipResult]:
    found = [
        (before, after, name, paired_flips(said[before][name], said[after][name]))
        for before, after in steps
        for name in said[before]
    ]
    p_values = [mcnemar(flips.gained, flips.lost) for *_, flips in found]
    return [
        FlipResult(
            before=before,
            after=after,
            measure=name,
            **flips._asdict(),
            p=p,
            p_holm=corrected,
            detectable=None if flips.gained + flips.lost else minimum_detectable_effect(flips.n),
        )
        for (before, after, name, flips), p, corrected in zip(
            found, p_values, holm(p_values), strict=True
        )
    ]


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
        values: Label -> value; at least one.

    Raises:
        DataError: A value differs from the first one.
    """
    first, *others = values
    for label in others:
        if values[label] != values[first]:
            raise DataError(
                f"{first} and {label} were measured with different {what}",
                where="the comparison",
                remedy="generate and judge all arms in the same way",
            )
