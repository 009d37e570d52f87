"""`lm-eval`: tasks of lm-evaluation-harness on the arms of an experiment."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from qresafe.commands.options import AsJson, Config, Name, Overrides, Storage, Workers, experiment
from qresafe.commands.running import Arms, execute

if TYPE_CHECKING:
    from qresafe.artifacts import Artifact

SHOWN = ("W", "Q0", "Q")


def lm_eval(
    config: Config,
    task: Annotated[list[str], typer.Option(help="A task's name; may be given several times.")],
    arms: Arms = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents per task; all.")] = None,
    include: Annotated[str | None, typer.Option(help="A folder with tasks of your own.")] = None,
    overrides: Overrides = None,
    workers: Workers = None,
    storage: Storage = None,
    name: Name = None,
    as_json: AsJson = False,
) -> None:
    """Run tasks of lm-evaluation-harness (extra `harness`) on arms; default W, Q0 and Q.

    It runs in this process, whatever `workers` is.
    """
    from qresafe.hf.harness import harness_version

    harness_version()  # before any work
    spec = experiment(config, overrides, workers=workers, storage=storage, name=name)
    chosen = arms or list(SHOWN)
    made = execute(
        spec,
        lambda one: [one.harness(arm, task, limit, include) for arm in chosen],
        as_json=as_json,
    )
    if not as_json:
        tell(dict(zip(chosen, made, strict=True)))


def tell(made: dict[str, Artifact]) -> None:
    """Print a row per task and metric, a column per model."""
    from qresafe.console import table

    found = {
        arm: json.loads((artifact.path / "results.json").read_text())
        for arm, artifact in made.items()
    }
    first = next(iter(found.values()))
    rows = [
        [task, metric, *(f"{results[task][metric]:.4f}" for results in found.values())]
        for task, metrics in first.items()
        for metric in metrics
    ]
    table(["task", "metric", *found], rows)
