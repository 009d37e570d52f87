"""MT-Bench in a table: an arm answers its questions, a judge behind an endpoint grades them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from qresafe.benchmarks.base import load
from qresafe.chat.client import check_server
from qresafe.judge_specs import EndpointSpec
from qresafe.judges.mt_bench import Question
from qresafe.specs import PromptSetSpec
from qresafe.stages import mt_bench, pools
from qresafe.stages.experiment import Experiment
from qresafe.stages.own_answers import answers_at


@dataclass(frozen=True)
class MtBench:
    """What answers are graded with.

    Attributes:
        questions: FastChat's question.jsonl.
        references: Reference answers to maths, reasoning and coding, in FastChat's format.
        judge: The endpoint, and the model there.
        max_new_tokens: Of an answer to either turn.
    """

    questions: Path
    references: Path | None
    judge: EndpointSpec
    max_new_tokens: int

    @cached_property
    def asked(self) -> Sequence[Question]:
        """The questions.

        Raises:
            DataError: A file is malformed, or a reference is missing.
        """
        return mt_bench.read_questions(self.questions, self.references)

    @property
    def options(self) -> list[str]:
        """What `qresafe reproduce` was told."""
        words = ["--mt-bench", str(self.questions)]
        if self.references:
            words += ["--references", str(self.references)]
        return [*words, "--judge", self.judge.model, "--endpoint", self.judge.endpoint]

    def check(self) -> None:
        """Find a user's mistakes before anything expensive starts.

        Raises:
            DataError: A file is malformed, or a reference is missing.
            ModelError: The judge does not answer.
        """
        _ = self.asked  # read, and kept
        check_server(self.judge.endpoint, self.judge.model, "--endpoint")

    def grade(self, experiment: Experiment, arm: str) -> float | None:
        """Return an arm's mean rating from 1 to 10; None where the judge decided nothing.

        The arm answers as in the evaluation, but without its system prompt.
        """
        prompts = load(PromptSetSpec(benchmark="mt_bench", path=str(self.questions)))
        plain = {"system_prompt": None, "max_new_tokens": self.max_new_tokens}
        spec = experiment.spec.evaluate.generate.model_copy(update=plain)
        question = pools.Question(f"{arm} on MT-Bench", experiment.model(arm), prompts, spec)
        where = experiment.run, experiment.runtime, experiment.progress
        made = question.ask(*where)
        answers = answers_at(experiment.run, f"{arm}={made.path}", self.asked)
        graded = mt_bench.mt_bench(
            experiment.run, self.asked, answers, None, self.judge, *where[1:]
        )
        average: float | None = graded.manifest.counts["result"]["average"]
        return average
