"""Two checkpoints answer the same prompts, for a gate or any other comparison of just two."""

from __future__ import annotations

from collections.abc import Mapping

from qresafe.artifacts import Artifact, Run
from qresafe.hf.models import resolve
from qresafe.hf.warm import ModelInput
from qresafe.progress import Progress
from qresafe.specs import ExperimentSpec
from qresafe.stages.arms import require_same
from qresafe.stages.compare import Arms
from qresafe.stages.generate import check_prompts, plan, template_key
from qresafe.stages.judge import check_judges, judge
from qresafe.stages.pools import Question, ask_at_once
from qresafe.stages.prompts import evaluation_prompts, file_prompts
from qresafe.stages.runtime import Runtime


def answer(
    spec: ExperimentSpec,
    paths: Mapping[str, str],
    prompts: str | None,
    runtime: Runtime,
    progress: Progress,
) -> Arms:
    """Generate and judge.

    Args:
        spec: How to generate and judge (`evaluate`), and where results go.
        paths: Label -> a model: a folder or a hub id.
        prompts: A prompt file, see `prompts.file_prompts`; None: those of `spec.evaluate`.
        runtime: Where to compute.
        progress: Told of every batch.

    Raises:
        UserError: A judge, prompt or model is not usable, or the chat templates differ; before
            anything is generated.
    """
    run = Run(spec.storage, spec.name)
    run.check()
    check_judges(spec.evaluate.judges, run)
    table = file_prompts(prompts) if prompts else evaluation_prompts(spec.evaluate.prompts)
    table, decoding = check_prompts(table), spec.evaluate.generate
    models = {
        label: ModelInput.of(resolve(spec.model.model_copy(update={"path": path})))
        for label, path in paths.items()
    }
    templates = {label: template_key(model) for label, model in models.items()}
    require_same("chat templates", templates)
    for model in models.values():
        plan(model, table, decoding)
    asked = {label: Question(label, model, table, decoding) for label, model in models.items()}
    made: dict[str, tuple[Artifact, Artifact]] = {}
    pools, answers = runtime.pools(), dict[str, Artifact]()
    if pools and len(asked) == len(pools):
        both = ask_at_once(run, list(asked.values()), pools, progress)
        answers = dict(zip(asked, both, strict=True))
    for label, question in asked.items():
        completions = answers.get(label) or question.ask(run, runtime, progress)
        verdicts = judge(run, completions, spec.evaluate.judges, progress, label, runtime)
        made[label] = (completions, verdicts)
    return made
