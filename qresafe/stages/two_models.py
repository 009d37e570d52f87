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
from qresafe.stages.generate import check_prompts, generate, plan, template_key
from qresafe.stages.judge import check_judges, judge
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
    table = check_prompts(table)
    models = {
        label: ModelInput.of(resolve(spec.model.model_copy(update={"path": path})))
        for label, path in paths.items()
    }
    templates = {label: template_key(model) for label, model in models.items()}
    require_same("chat templates", templates)
    for model in models.values():
        plan(model, table, spec.evaluate.generate)
    made: dict[str, tuple[Artifact, Artifact]] = {}
    for label, model in models.items():
        completions = generate(
            run,
            label=label,
            model=model,
            prompts=table,
            spec=spec.evaluate.generate,
            runtime=runtime,
            progress=progress,
        )
        verdicts = judge(run, completions, spec.evaluate.judges, progress, label, runtime)
        made[label] = (completions, verdicts)
    return made
