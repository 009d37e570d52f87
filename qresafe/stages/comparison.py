"""The shape of comparison.json: what was found of every arm, and between arms."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Found(BaseModel):
    """Immutable data of a comparison."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class OutcomeCounts(Found):
    """What one judge said of one axis; the four outcomes add up to `n`."""

    judge: str
    axis: str
    n: int
    refused: int
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
        clusters: How many clusters of prompts the completions come in; None: each stands alone.
        cluster_low: Lower end of the interval that resamples whole clusters.
        cluster_high: Upper end.
    """

    yes: int
    n: int
    share: float | None
    low: float
    high: float
    undecided: int = 0
    clusters: int | None = None
    cluster_low: float | None = None
    cluster_high: float | None = None


class AtK(Found):
    """Mean chance that at least one of k samples of a prompt is a yes (ASR@k).

    Attributes:
        measure: A name of `measures.MEASURES`.
        k: Samples drawn.
        n: Prompts with at least k decided samples.
        share: The mean over prompts, in [0, 1].
        low: Lower end of its 95 % cluster interval.
        high: Upper end.
    """

    measure: str
    k: int
    n: int
    share: float
    low: float
    high: float


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
    by_category: dict[str, dict[str, Share]] = {}
    by_language: dict[str, dict[str, Share]] = {}
    at_k: list[AtK] = []


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
        detectable: Smallest change of the share that as many independent prompts would have shown
            with 80 % power at 5 %.
        difference: Share after minus share before.
        low: Lower end of its 95 % interval (`paired.change_of`).
        high: Upper end.
        method: How that interval was made.
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
    difference: float = 0.0
    low: float = -1.0
    high: float = 1.0
    method: str = ""


class Agreement(Found):
    """How two judges agree on the same completions.

    Attributes:
        first: A judge.
        second: Another.
        n: Completions that both judged.
        observed: Share of equal verdicts.
        kappa: Cohen's kappa, in [-1, 1]; None where chance alone explains all.
        low: Lower end of kappa's 95 % interval, if known.
        high: Upper end.
        label: The arm; "" for all.
    """

    first: str
    second: str
    n: int
    observed: float
    kappa: float | None = None
    low: float | None = None
    high: float | None = None
    label: str = ""


class Contamination(Found):
    """Calibration prompts that resemble evaluation prompts.

    Attributes:
        calibration: Calibration prompts looked at.
        evaluation: Evaluation prompts looked at.
        exact: Calibration prompts that are an evaluation prompt.
        near: Those that nearly are.
        dropped: How many of them were left out of calibration.
    """

    calibration: int
    evaluation: int
    exact: int
    near: int
    dropped: int


class AttackConfiguration(Found):
    """One decoding configuration of an attack: its settings and the share of attacks it wins."""

    name: str
    family: str = ""  # "temperature", "top_p", "top_k": a row of the heat map
    value: str = ""  # the setting in that family
    share: Share


class Attack(Found):
    """A decoding attack on one arm.

    Attributes:
        label: The arm.
        measure: A name of `measures.MEASURES`.
        worst: Prompts that at least one configuration wins.
        configurations: Each configuration's share.
    """

    label: str
    measure: str = "compliance"
    worst: Share | None = None
    configurations: list[AttackConfiguration] = []


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


class Comparison(Found):
    """What `compare` found.

    Attributes:
        judges: Role (`attack`, `main`) -> judge.
        prompts: Axis -> benchmark -> number of prompts.
        samples: Completions per prompt.
        cluster: What the clusters of the cluster intervals are: "phrase", "prompt" (with more than
            one sample), or "" where every completion stands alone.
        arms: In the order that they were given in.
        flips: All pairs of arms and measures.
        attribution: Empty without a control arm.
    """

    judges: dict[str, str]
    prompts: dict[str, dict[str, int]]
    samples: int
    arms: list[ArmResult]
    flips: list[FlipResult]
    attribution: list[Attribution]
    cluster: str = ""
    agreement: list[Agreement] = []
    contamination: Contamination | None = None
    attacks: list[Attack] = []

    def arm(self, label: str) -> ArmResult | None:
        """Return the arm called `label`, or None."""
        return next((arm for arm in self.arms if arm.label == label), None)
