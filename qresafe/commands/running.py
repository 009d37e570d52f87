"""Running an experiment for a command, and telling its result to a person or a program."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qresafe.errors import SpecError, UserError, nearest
from qresafe.specs import ExperimentSpec

if TYPE_CHECKING:
    from qresafe.artifacts import Artifact
    from qresafe.progress import Progress
    from qresafe.stages.comparison import AtK, Comparison, Share
    from qresafe.stages.experiment import Experiment
    from qresafe.stages.runtime import Runtime


Arms = Annotated[
    list[str] | None,
    typer.Option("--arm", help="W, control, Q0, Q or adapter; may be given several times."),
]


Want = Callable[["Experiment"], Any]  # asks an experiment for an artefact

# A stage's name -> what it is called in `Experiment`.
PROPERTIES = {
    "quantize": "quantized",
    "pairs": "pairs",
    "reference": "reference",
    "patch": "patched",
    "export": "exported",
    "compare": "comparison",
    "report": "report",
}
STAGES = (*PROPERTIES, "generate", "judge", "attack")
ATTACKED = ("W", "Q0", "Q")


def wanted(stage: str, arms: Sequence[str] | None = None) -> Want:
    """Return what asks an experiment for a stage's artefact.

    Args:
        stage: One of `STAGES`.
        arms: For generate and judge: which arms, default all; for attack: default W, Q0, Q.

    Raises:
        SpecError: There is no such stage.
    """
    if stage == "generate":
        return lambda experiment: [experiment.completions(arm) for arm in arms or experiment.arms]
    if stage == "judge":
        return lambda experiment: [experiment.verdicts(arm) for arm in arms or experiment.arms]
    if stage == "attack":
        return lambda experiment: [experiment.attacked(arm) for arm in arms or ATTACKED]
    if stage not in PROPERTIES:
        raise SpecError(f"unknown stage {stage!r}", remedy=nearest(stage, STAGES))
    return attrgetter(PROPERTIES[stage])


def execute(spec: ExperimentSpec, want: Want, *, as_json: bool, room: bool = False) -> Any:
    """Compute what `want` asks of an experiment, tell of it on stdout, and return it.

    Args:
        spec: The resolved experiment.
        want: Asks for an artefact; what it needs is computed before, what is finished is reused.
        as_json: Print JSON instead of tables.
        room: Refuse what `qresafe plan` says cannot fit: at once on this machine; on a cluster as
            soon as something is to be computed there, for its nodes may come only then.
    """
    from qresafe.console import progress_on
    from qresafe.dist.capacity import require_room
    from qresafe.driving import driving
    from qresafe.stages.experiment import Experiment
    from qresafe.stages.runtime import InProcessRuntime

    with progress_on() as progress:
        experiment = Experiment(spec, InProcessRuntime(), progress)
        experiment.check()  # before Ray starts: a mistake should cost a second, not ten
        model = experiment.teacher.ref.path
        if room:
            require_room(spec, model, connected=False)
        ready = partial(require_room, spec, model, connected=True) if room else None
        with (
            driving(experiment.run.root, progress) as experiment.progress,
            closing(started(spec, experiment.progress, ready)) as experiment.runtime,
        ):
            result = want(experiment)
    if as_json:
        typer.echo(json.dumps(as_data(experiment), indent=1))
    else:
        _tell(experiment)
    return result


def started(
    spec: ExperimentSpec, progress: Progress, ready: Callable[[], None] | None = None
) -> Runtime:
    """Return what runs a spec's stages: this process at `workers: 0`, else Ray.

    Args:
        spec: The resolved experiment.
        progress: Is told that Ray starts.
        ready: See `make_runtime`.

    Raises:
        UserError: The cluster cannot be joined, or one of its hosts lacks the storage or the model.
    """
    from qresafe.artifacts import Run
    from qresafe.dist.hosts import check_hosts
    from qresafe.dist.runtime import make_runtime

    if not spec.resources.workers:
        return make_runtime(spec.resources)
    progress.start("start Ray")
    runtime = make_runtime(spec.resources, ready)
    progress.finish()
    model = Path(spec.model.path).expanduser()
    try:
        check_hosts(Run(spec.storage, spec.name).root, [model.resolve()] if model.is_dir() else [])
    except UserError:
        runtime.close()
        raise
    return runtime


def as_data(experiment: Experiment) -> dict[str, Any]:
    """Return what `--json` prints: every stage with its folder and counts, and the comparison."""
    data: dict[str, Any] = {
        "run": str(experiment.run.root),
        "stages": [stage_data(name, made) for name, made in experiment.stages],
    }
    if compared := _made(experiment, "compare"):
        data["comparison"] = json.loads((compared.path / "comparison.json").read_text())
    if attacks := [a for _, a in experiment.stages if a.manifest.stage == "attack_result"]:
        data["attacks"] = [json.loads((a.path / "attack.json").read_text()) for a in attacks]
    if reported := _made(experiment, "report"):
        data["report"] = str(reported.path / "report.html")
    return data


def stage_data(name: str, made: Artifact) -> dict[str, Any]:
    """Return what a program wants to know of a finished stage."""
    return {
        "name": name,
        "stage": made.manifest.stage,
        "key": made.key,
        "path": str(made.path),
        "reused": made.reused,
        "seconds": made.manifest.seconds,
        "counts": made.manifest.counts,
    }


def _made(experiment: Experiment, stage: str) -> Artifact | None:
    return next((a for _, a in experiment.stages if a.manifest.stage == stage), None)


def _tell(experiment: Experiment) -> None:
    from qresafe.console import table

    if compared := _made(experiment, "compare"):
        tell_comparison(compared)
    else:
        rows = [[name, str(made.path)] for name, made in experiment.stages]
        table(["stage", "result"], rows)
    if reported := _made(experiment, "report"):
        typer.echo(f"\nreport: {reported.path / 'report.html'}")


def tell_comparison(compared: Artifact) -> None:
    """Print a comparison: a row for each measure, a column for each model."""
    from qresafe.console import table
    from qresafe.stages.compare import read_comparison
    from qresafe.stages.measures import MEASURES

    comparison = read_comparison(compared)
    asked = [m for m in MEASURES if any(m.name in arm.measures for arm in comparison.arms)]
    header = ["% of n", "n", *(arm.label for arm in comparison.arms)]
    table(header, [_share_row(measure.title, measure.name, comparison) for measure in asked])
    typer.echo(f"\nBelow each share: {_kind_of_interval(comparison.cluster)}.")
    for measure in asked:
        typer.echo(f"{measure.title}: {measure.meaning} ({measure.better} is good)")


def _share_row(title: str, name: str, comparison: Comparison) -> list[str]:
    shares = [arm.measures.get(name) for arm in comparison.arms]
    sizes = sorted({share.n for share in shares if share})
    size = "-".join(str(n) for n in dict.fromkeys((sizes[0], sizes[-1])))
    return [title, size, *(share_cell(share) for share in shares)]


def _kind_of_interval(cluster: str) -> str:
    if not cluster:
        return "its 95 % Wilson interval"
    return f"its 95 % cluster interval, by whole {cluster}s; without clusters, Wilson's"


def share_cell(share: Share | AtK | None) -> str:
    """Return a share in percent, below it the interval that knows of clusters, or else Wilson's."""
    if share is None or share.share is None:
        return "-"
    low, high = share.interval
    return f"{100 * share.share:.1f}\n{100 * low:.1f}-{100 * high:.1f}"
