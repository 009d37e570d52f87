"""The shape of comparison.json: what was found of every arm, and between arms."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Found(BaseModel):
    """Immutable data of a comparison."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class OutcomeCounts(Found):
    """What one judge said of one axis; the five outcomes add up to `n`."""

    judge: str
    axis: str
    n: int
    refused: int
    partial: int
    complied: int
    incoherent: int
    undecided: int


class Share(Found):
    """A share with its 95 % Wilson interval; undecided completions are in neither count.

    Attributes:
        yes: Completions that count.
        n: Completions that are decided.
        share: yes / n, in [0, 1]; None where n is 0.
        low: Lower end of the interval.
        high: Upper end of the interval.
        undecided: Completions left out.
    """

    yes: int
    n: int
    share: float | None
    low: float
    high: float
    undecided: int = 0


class Utility(Found):
    """Figures of benign prompts with reference answers that are no shares.

    Attributes:
        n: Completions that ROUGE-L averages.
        rouge_l: Mean F1 of the longest common subsequence, in [0, 1].
        rouge_l_low: Lower end of the mean's 95 % interval (Student's t).
        rouge_l_high: Upper end.
        perplexity: Of the reference answers, over all their tokens; None without log-probs.
        target_tokens: How many tokens that are.
    """

    n: int
    rouge_l: float
    rouge_l_low: float
    rouge_l_high: float
    perplexity: float | None
    target_tokens: int


class ArmResult(Found):
    """All figures of one model."""

    label: str
    counts: list[OutcomeCounts]
    measures: dict[str, Share]  # by the names of `measures.MEASURES`; absent: cannot be asked
    by_benchmark: dict[str, dict[str, Share]]  # the same for each benchmark, where there are more
    utility: Utility | None


class FlipResult(Found):
    """How one measure changed between two arms, prompt by prompt.

    Attributes:
        before: Label of the first arm.
        after: Label of the second.
        measure: A name of `measures.MEASURES`.
        n: Completions decided under both.
        gained: Not so before, so after.
        lost: So before, not so after.
        p: McNemar's exact two-sided p.
        p_holm: The same, Holm-corrected over all rows of the comparison.
        detectable: Smallest change of the share that n would have shown with 80 % power at
            5 %; given where nothing flipped.
    """

    before: str
    after: str
    measure: str
    n: int
    gained: int
    lost: int
    p: float
    p_holm: float
    detectable: float | None = None


class Attribution(Found):
    """A quantized model's change of one measure, split at its full-precision control.

    Attributes:
        measure: A name of `measures.MEASURES`.
        total: Share under Q0 minus share under W.
        fine_tuning: Share under the control minus share under W.
        precision: Share under Q0 minus share under the control.
    """

    measure: str
    total: float
    fine_tuning: float
    precision: float


class JudgeAgreement(Found):
    """How far two judges say the same of one model's answers.

    Refused and partial are one class here; complied and incoherent are the others.

    Attributes:
        arm: Label of the model.
        first: A judge.
        second: Another.
        n: Completions that both have decided.
        same: Those of which both say the same.
        kappa: Cohen's kappa; None where both say the same of every completion alike.
    """

    arm: str
    first: str
    second: str
    n: int
    same: int
    kappa: float | None


class Comparison(Found):
    """What `compare` found.

    Attributes:
        judges: Role (`attack`, `main`) -> judge.
        prompts: Axis -> benchmark -> number of prompts.
        samples: Completions per prompt. With more than one, the rows of a prompt are not
            independent: intervals are then too narrow.
        arms: In the order that they were given in.
        flips: All pairs of arms and measures.
        attribution: Empty without a control arm.
        agreement: Every pair of judges, arm by arm; empty with one judge.
    """

    judges: dict[str, str]
    prompts: dict[str, dict[str, int]]
    samples: int
    arms: list[ArmResult]
    flips: list[FlipResult]
    attribution: list[Attribution]
    agreement: list[JudgeAgreement] = []

    def arm(self, label: str) -> ArmResult | None:
        """Return the arm called `label`, or None."""
        return next((arm for arm in self.arms if arm.label == label), None)
