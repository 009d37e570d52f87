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


class Overlap(Found):
    """A calibration prompt that was dropped: both ids, and how similar the texts are, in [0, 1]."""

    calibration: str
    evaluation: str
    similarity: float


class Contamination(Found):
    """How far the calibration prompts were also evaluation prompts.

    Attributes:
        calibration: Calibration prompts before any was dropped.
        evaluation: Evaluation prompts.
        exact: Dropped because the normalised text is evaluated too.
        near: Dropped because a nearly equal text is.
        measure: Of similarity.
        threshold: From which similarity on a prompt was dropped.
        highest_kept: The highest similarity among those that were kept.
        examples: Some of the dropped ones, the most similar first.
    """

    calibration: int
    evaluation: int
    exact: int
    near: int
    measure: str
    threshold: float
    highest_kept: float
    examples: list[Overlap] = []


class Source(Found):
    """Where a benchmark's prompts come from and under which licence; `repeats` were dropped."""

    title: str
    licence: str
    citation: str
    origin: str
    repeats: int = 0


class AttackCell(Found):
    """One framing under one decoding configuration.

    Attributes:
        framing: System prompt, template and prefill; "plain": none of them.
        configuration: Such as "temperature 0.95".
        share: Over all prompts and draws; with several draws the cluster interval is what counts.
        success_at_k: k -> unbiased estimate of the share of prompts on which at least one of k
            draws succeeds (None: no prompt has k decided draws); empty with one draw.
    """

    framing: str
    configuration: str
    share: Share
    success_at_k: dict[int, float | None] = {}


class AttackMeasure(Found):
    """One measure of an attack.

    Attributes:
        measure: A name of `measures.MEASURES`.
        worst_case: Share of prompts on which any completion at all counts; a prompt is undecided
            if none does and one is undecided.
        worst_case_by_framing: The same for each framing alone.
        cells: Framing by framing, in the configurations' order.
    """

    measure: str
    worst_case: Share
    worst_case_by_framing: dict[str, Share]
    cells: list[AttackCell]


class AttackResult(Found):
    """What an attack on one model achieved.

    Attributes:
        label: The model.
        judges: Role (`attack`, `main`) -> judge.
        prompts: Harmful prompts that were tried.
        samples: Draws of each prompt in each cell.
        framings: Names, in order.
        configurations: Names, in order.
        measures: attack_success, compliance and coherence, as far as the judges tell.
    """

    label: str
    judges: dict[str, str]
    prompts: int
    samples: int
    framings: list[str]
    configurations: list[str]
    measures: list[AttackMeasure]


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
        agreement: Every pair of judges, arm by arm; empty with one judge.
        contamination: None where no calibration took place, or it is not known.
        sources: Benchmark -> its licence and citation, of public benchmarks.
        attacks: One per model that was attacked; empty without `evaluate.attack`.
    """

    judges: dict[str, str]
    prompts: dict[str, dict[str, int]]
    samples: int
    arms: list[ArmResult]
    flips: list[FlipResult]
    attribution: list[Attribution]
    cluster: str = ""
    agreement: list[JudgeAgreement] = []
    contamination: Contamination | None = None
    sources: dict[str, Source] = {}
    attacks: list[AttackResult] = []

    def arm(self, label: str) -> ArmResult | None:
        """Return the arm called `label`, or None."""
        return next((arm for arm in self.arms if arm.label == label), None)
