"""One trial: the patch of a proposal, exported and measured on the validation prompts."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qresafe.artifacts import Artifact
from qresafe.errors import DivergedError, OutOfMemoryError
from qresafe.failure import is_out_of_memory
from qresafe.progress import Silent
from qresafe.search_space import Params
from qresafe.search_spec import ProbeSpec
from qresafe.specs import ExperimentSpec, GenerateSpec
from qresafe.stages.arms import Q0, Q, compare_arms
from qresafe.stages.columns import read_arm
from qresafe.stages.comparison import ArmResult
from qresafe.stages.experiment import Experiment
from qresafe.stages.patch import needs_reference
from qresafe.stages.probe import Probe, Tell, choose_prompts
from qresafe.stages.runtime import Runtime
from qresafe.stages.search.ledger import Row
from qresafe.stages.search.metrics import Figures, measured


@dataclass(frozen=True)
class TrialJob:
    """A proposal as its worker gets it: small and picklable.

    Attributes:
        index: Its place in the search.
        params: What it sets.
        spec: Its experiment, on the validation prompts.
        probe: What it is asked on the way.
        start: Key of the patch whose last checkpoint it goes on from.
    """

    index: int
    params: Params
    spec: ExperimentSpec
    probe: ProbeSpec
    start: str | None = None

    def run(self, runtime: Runtime, tell: Tell) -> Row:
        """Train, export, answer and judge; a failure is a row too.

        Args:
            runtime: Where.
            tell: Hears of every probe.
        """
        began = time.perf_counter()
        own: dict[str, Any] = {"index": self.index, "params": self.params, "continued": self.start}
        try:
            found = self._measure(runtime, tell)
        except Exception as error:  # a trial that fails is a row, never a lost search
            kind, reason = failure(error)
            found = {"status": "failed", "kind": kind, "reason": reason}
        return Row(**own, **found, seconds=round(time.perf_counter() - began, 3))

    def _measure(self, runtime: Runtime, tell: Tell) -> dict[str, Any]:
        experiment = Experiment(self.spec, runtime, Silent())
        probe = experiment.probe = make_probe(experiment, self.probe, tell)
        if self.start:
            experiment.start = experiment.run.folder("patch", self.start)
        figures = Figures(
            q=arm_result(experiment, Q),
            q0=arm_result(experiment, Q0),
            patch=experiment.patched.manifest.counts,
            export=experiment.exported.manifest.counts,
        )
        made = {"patch": experiment.patched, "export": experiment.exported}
        made |= {"generate": experiment.completions(Q), "judge": experiment.verdicts(Q)}
        return {
            "status": "completed",
            "metrics": measured(figures),
            "curve": probe.curve(history(experiment.patched)),
            "keys": {stage: artifact.key for stage, artifact in made.items()},
        }


def share_stages(experiment: Experiment) -> None:
    """Make all that the trials of a search have in common, up to Q0's measures."""
    _ = experiment.pairs
    if needs_reference(experiment.spec.patch):
        _ = experiment.reference
    experiment.verdicts(Q0)


def make_probe(experiment: Experiment, spec: ProbeSpec, tell: Tell | None = None) -> Probe:
    """Return a probe with prompts of an experiment's evaluation."""
    asked = experiment.spec.evaluate
    return Probe(
        every=spec.every,
        prompts=choose_prompts(experiment.prompts, spec.axes, spec.prompts),
        generate=GenerateSpec(
            max_new_tokens=min(spec.max_new_tokens, asked.generate.max_new_tokens),
            system_prompt=asked.generate.system_prompt,
        ),
        judges=tuple(judge for judge in asked.judges if isinstance(judge, str)),
        tell=tell,
    )


def arm_result(experiment: Experiment, arm: str) -> ArmResult:
    """Return the measures of one arm."""
    read = read_arm(arm, experiment.completions(arm), experiment.verdicts(arm))
    return compare_arms([read], []).arms[0]


def history(patched: Artifact) -> list[Mapping[str, Any]]:
    """Return the records of a patch's steps."""
    lines = (patched.path / "history.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def failure(error: BaseException) -> tuple[str, str]:
    """Return the kind of a failure, equal for equal causes, and one line about it."""
    text = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, DivergedError):
        return "diverged", text
    if isinstance(error, OutOfMemoryError) or is_out_of_memory(error):
        return "out of memory", text
    return type(error).__name__, text
