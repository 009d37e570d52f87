"""A whole experiment: W -> Q0 -> pairs -> patch -> export -> compare -> report.

Every artefact is a property that is computed when first asked for, together with what it needs.
So `experiment.report` runs everything, `experiment.pairs` stops there, and a variant of an
experiment shares every stage that its spec does not touch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa
from upath import UPath

from qresafe.artifacts import Artifact, Run
from qresafe.errors import ModelError, SpecError, nearest
from qresafe.hf.chat import prompt_ids
from qresafe.hf.models import load_tokenizer, resolve
from qresafe.hf.warm import ModelInput
from qresafe.progress import Progress, Silent
from qresafe.registry import judges, quantizers
from qresafe.specs import AttackSpec, ExperimentSpec
from qresafe.stages.arms import ADAPTER, CONTROL, Q0, Q, W
from qresafe.stages.attack import attack, harmful_prompts
from qresafe.stages.attack_grid import cells
from qresafe.stages.attack_result import attack_result
from qresafe.stages.compare import compare
from qresafe.stages.comparison import Contamination
from qresafe.stages.contamination import decontaminate
from qresafe.stages.decoding import calibration_decoding, teacher_decoding
from qresafe.stages.endpoint import check_endpoint
from qresafe.stages.export import export
from qresafe.stages.generate import check_prompts
from qresafe.stages.harness import harness
from qresafe.stages.judge import check_judges, judge
from qresafe.stages.pairs import pairs
from qresafe.stages.patch import needs_reference, patch
from qresafe.stages.patchable import check_patchable
from qresafe.stages.pools import Question, ask_at_once
from qresafe.stages.probe import Probe
from qresafe.stages.prompts import calibration_prompts, evaluation_prompts
from qresafe.stages.quantize import check_ready, quantize
from qresafe.stages.reference import reference
from qresafe.stages.report import ReportInput, report
from qresafe.stages.runtime import Runtime
from qresafe.stages.served import check_engine

ARMS = (W, CONTROL, Q0, Q, ADAPTER)  # in the order of every table
ATTACKED = (W, Q0, Q)
EVALUATION, CALIBRATION = "evaluation", "calibration"
TEACHER = "teacher"  # who answers for W where the pairs are made, if that is another model


@dataclass
class Experiment:
    """The artefacts of one experiment, each made on first use.

    Attributes:
        spec: The resolved experiment.
        runtime: Where batches and training run.
        progress: Told what is going on.
        stages: (name, artefact) of all that was asked for so far, in order.
        probe: Asked of the patch while it is trained; None: nothing.
        start: See `patch`.
    """

    spec: ExperimentSpec
    runtime: Runtime
    progress: Progress = field(default_factory=Silent)
    stages: list[tuple[str, Artifact]] = field(default_factory=list)
    probe: Probe | None = None
    start: UPath | None = None

    def __post_init__(self) -> None:
        self.run = Run(self.spec.storage, self.spec.name)
        self._answers: dict[tuple[str, str], Artifact] = {}  # (who, prompt set) -> completions

    def check(self) -> None:
        """Find a user's mistakes before anything expensive starts.

        Raises:
            UserError: A name is unknown, a file malformed, or a model not usable.
        """
        quantizers.get(self.spec.quantize.method)
        judges.get(self.spec.pairs.judge)
        check_judges(self.spec.evaluate.judges, self.run)
        check_prompts(self.prompts), check_prompts(self.calibration)
        if self.spec.evaluate.attack:
            cells(self.spec.evaluate.attack)
            harmful_prompts(self.prompts)
        check_engine(self.spec, self.teacher.ref.path)
        prompt_ids(self.tokenizer, "a prompt", self.spec.evaluate.generate.system_prompt)
        self._check_teacher()
        check_ready(self.spec.quantize, self.teacher)
        check_patchable(self.spec.patch, self.spec.quantize)
        self.run.check()

    @cached_property
    def teacher(self) -> ModelInput:
        """W, found and fingerprinted."""
        return ModelInput.of(resolve(self.spec.model))

    @cached_property
    def tokenizer(self) -> Any:
        """W's tokenizer, which Q0 shares."""
        return _tokenizer(self.teacher)

    @cached_property
    def answerer(self) -> ModelInput | None:
        """The model that gives the answers y_w: W, unless pairs.teacher names another.

        None for an endpoint.
        """
        asked = self.spec.pairs.teacher
        if asked is None:
            return self.teacher
        return ModelInput.of(resolve(asked.model)) if asked.model else None

    @cached_property
    def scorer(self) -> ModelInput | None:
        """The answerer, if its next-token distributions can be learned from; else None.

        They can where it reads the same tokens, and the same prompts, as Q0.
        """
        asked, model = self.spec.pairs.teacher, self.answerer
        if asked is None or model is None:
            return model
        same = _tokenizer(model).get_vocab() == self.tokenizer.get_vocab()
        return model if same and not asked.system_prompt else None

    @cached_property
    def prompts(self) -> pa.Table:
        """The evaluation prompts of all benchmarks, in the spec's order."""
        return evaluation_prompts(self.spec.evaluate.prompts)

    @cached_property
    def _pool(self) -> tuple[pa.Table, Contamination]:
        pool = calibration_prompts(self.spec.pairs)
        return decontaminate(pool, self.prompts, self.spec.pairs.near_duplicate)

    @property
    def calibration(self) -> pa.Table:
        """The prompts that W and Q0 answer to make pairs; none of them is evaluated."""
        return self._pool[0]

    @property
    def contamination(self) -> Contamination:
        """What was dropped from the calibration prompts because it is evaluated."""
        return self._pool[1]

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms that this experiment has, in table order.

        Raises:
            SpecError: An endpoint answers: it is one model, whatever the arm is called.
        """
        self._require_own_answers(Q)
        absent = set()
        if not self.quantized.manifest.counts["control"]:
            absent.add(CONTROL)
        if not self.spec.has_adapter:
            absent.add(ADAPTER)
        if self.not_patchable:
            absent |= {Q, ADAPTER}
        return tuple(arm for arm in ARMS if arm not in absent)

    def model(self, arm: str) -> ModelInput:
        """Return the model of an arm, which is always loaded from disk.

        Raises:
            SpecError: No such arm.
        """
        if arm == W:
            return self.teacher
        if arm not in ARMS:
            raise SpecError(f"no arm {arm!r}", remedy=nearest(arm, ARMS))
        made = self.quantized if arm in (CONTROL, Q0) else self.exported
        name = {CONTROL: "control", ADAPTER: "unrounded"}.get(arm, "checkpoint")
        return ModelInput.in_folder(made.path / name, f"{made.key}/{name}", self.spec.model.dtype)

    @cached_property
    def quantized(self) -> Artifact:
        """Q0 and, if the method fine-tunes, its full-precision control."""
        made = quantize(
            self.run,
            self.teacher,
            self.spec.quantize,
            self.progress,
            control=self.spec.control,
            check=self.runtime.check,
        )
        return self._note("quantize", made)

    @property
    def not_patchable(self) -> str:
        """Why Q0 can only be assessed (a checkpoint made elsewhere); empty if it can be patched."""
        return str(self.quantized.manifest.counts.get("not_patchable", ""))

    @cached_property
    def pairs(self) -> Artifact:
        """The training rows (x, y_w, y_l)."""
        teacher = W if self.spec.pairs.teacher is None else TEACHER
        self._ask_both(teacher, CALIBRATION)
        made = pairs(
            self.run,
            teacher_completions=self._answered(teacher, CALIBRATION),
            q0_completions=self.completions(Q0, CALIBRATION),
            tokenizer=self.tokenizer,
            teacher=self.scorer,
            spec=self.spec.pairs,
            runtime=self.runtime,
            progress=self.progress,
            contamination=self.contamination,
        )
        return self._note("pairs", made)

    @cached_property
    def reference(self) -> Artifact | None:
        """Log-probs of both answers under Q0; None where the patch does not read them."""
        if not needs_reference(self.spec.patch):
            return None
        made = reference(
            self.run,
            q0=self.model(Q0),
            pairs=self.pairs,
            batch_size=self.spec.pairs.batch_size,
            runtime=self.runtime,
            progress=self.progress,
        )
        return self._note("reference", made)

    @cached_property
    def patched(self) -> Artifact:
        """The trained factors, masks, codes and history."""
        if self.not_patchable:
            raise ModelError(self.not_patchable)
        made = patch(
            self.run,
            q0=self.model(Q0),
            pairs=self.pairs,
            reference=self.reference,
            spec=self.spec.patch,
            runtime=self.runtime,
            progress=self.progress,
            probe=self.probe,
            start=self.start,
            latents=self.quantized.path / "latent" if self.spec.patch.start == "latent" else None,
        )
        return self._note("patch", made)

    @cached_property
    def exported(self) -> Artifact:
        """Q in Q0's own format, the patch file, and the unrounded adapter."""
        unrounded = self.spec.has_adapter
        made = export(self.run, self.quantized, self.patched, self.progress, unrounded=unrounded)
        return self._note("export", made)

    def completions(self, arm: str, on: str = EVALUATION) -> Artifact:
        """Return an arm's answers to the evaluation or the calibration prompts."""
        if on == EVALUATION:
            self._require_own_answers(arm)
        return self._answered(arm, on)

    def _answered(self, who: str, on: str) -> Artifact:
        if (who, on) not in self._answers:
            asked = self._question(who, on)
            self._answers[who, on] = asked.ask(self.run, self.runtime, self.progress)
        return self._note(f"generate {who} {on}", self._answers[who, on])

    def _question(self, who: str, on: str) -> Question:
        label = who if on == EVALUATION else f"{who} on {on}"
        if who == TEACHER and (teacher := self.spec.pairs.teacher):
            spec = teacher_decoding(self.spec, teacher)
            return Question(label, self.answerer, self.calibration, spec)
        if on == CALIBRATION:
            spec = calibration_decoding(self.spec)
            return Question(label, self.model(who), self.calibration, spec)
        return Question(label, self.model(who), self.prompts, self.spec.evaluate.generate)

    def _ask_both(self, teacher: str, on: str) -> None:
        """Have a teacher and Q0 answer at the same time, where each has a pool of workers."""
        both = (teacher, Q0)
        pools = self.runtime.pools()
        if pools and not any((who, on) in self._answers for who in both):
            asked = [self._question(who, on) for who in both]
            made = ask_at_once(self.run, asked, pools, self.progress)
            self._answers |= {(who, on): one for who, one in zip(both, made, strict=True)}

    def verdicts(self, arm: str) -> Artifact:
        """Return all judges' verdicts on an arm's answers."""
        completions = self.completions(arm)
        asked = self.spec.evaluate.judges
        made = judge(self.run, completions, asked, self.progress, arm, self.runtime)
        return self._note(f"judge {arm}", made)

    def attacked(self, arm: str) -> Artifact:
        """Return what the attack of `evaluate.attack` (or the default one) achieved on an arm."""
        spec = self.spec.evaluate.attack or AttackSpec()
        tried = attack(
            self.run,
            label=arm,
            model=self.model(arm),
            prompts=self.prompts,
            spec=spec,
            runtime=self.runtime,
            progress=self.progress,
        )
        self._note(f"attack {arm}", tried)
        named = self.spec.evaluate.judges
        told = f"attack on {arm}"
        verdicts = judge(self.run, tried, named, self.progress, told, self.runtime)
        self._note(f"judge attack {arm}", verdicts)
        made = attack_result(
            self.run,
            label=arm,
            completions=tried,
            verdicts=verdicts,
            spec=spec,
            progress=self.progress,
        )
        return self._note(f"attack result {arm}", made)

    def harness(
        self, arm: str, tasks: Sequence[str], limit: int | None, include: str | None
    ) -> Artifact:
        """Return an arm's results on tasks of lm-evaluation-harness."""
        made = harness(
            self.run,
            label=arm,
            model=self.model(arm),
            tasks=tasks,
            limit=limit,
            include=include,
            progress=self.progress,
        )
        return self._note(f"lm-eval {arm}", made)

    @cached_property
    def measured(self) -> dict[str, tuple[Artifact, Artifact]]:
        """Arm -> its completions and the verdicts on them."""
        arms = self.arms
        self._ask_both(W, EVALUATION)
        return {arm: (self.completions(arm), self.verdicts(arm)) for arm in arms}

    @cached_property
    def comparison(self) -> Artifact:
        """Rates, intervals and paired flips of all arms."""
        tried = [a for a in ATTACKED if a in self.arms] if self.spec.evaluate.attack else []
        made = compare(
            self.run,
            self.measured,
            self.progress,
            contamination=self.contamination,
            attacks=[self.attacked(arm) for arm in tried],
        )
        return self._note("compare", made)

    @cached_property
    def report(self) -> Artifact:
        """The HTML page, its JSON and the model card."""
        comparison = self.comparison
        given = ReportInput(
            spec=self.spec.model_dump(mode="json"),
            comparison=comparison,
            arms=self.measured,
            patch=None if self.not_patchable else self.patched,
            export=None if self.not_patchable else self.exported,
            session_seconds=self.runtime.startup_seconds,
            stages=tuple(self.stages),
        )
        return self._note("report", report(self.run, given, self.progress))

    def _check_teacher(self) -> None:
        teacher, patch = self.spec.pairs.teacher, self.spec.patch
        ours = patch.method in ("masked_lora", "flips")
        if ours and patch.objective.kl > 0 and self.scorer is None:
            what = "the kl term needs the teacher's token distributions, and this teacher has none"
            remedy = "set patch.objective=sft, or another teacher"
            raise SpecError(what, where="pairs.teacher", remedy=remedy)
        if teacher and teacher.endpoint:
            check_endpoint(teacher_decoding(self.spec, teacher))

    def _require_own_answers(self, arm: str) -> None:
        if arm != W and self.spec.evaluate.generate.engine == "openai":
            what = f"engine 'openai' asks its endpoint, so {arm} would not be what answers"
            remedy = "use engine transformers or vllm; `generate --arm W` may ask an endpoint"
            raise SpecError(what, where="evaluate.generate", remedy=remedy)

    def _note(self, name: str, artifact: Artifact) -> Artifact:
        if all(artifact.path != other.path for _, other in self.stages):
            self.stages.append((name, artifact))
        return artifact


def _tokenizer(model: ModelInput) -> Any:
    return load_tokenizer(model.ref.path, trust_remote_code=model.ref.trust_remote_code)
