"""Scores that others define: lm-evaluation-harness tasks on arms, and IFEval of completions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qresafe.commands.files import file_spec
from qresafe.commands.options import AsJson, Config, Name, Overrides, Storage, Workers, experiment
from qresafe.commands.running import Arms, execute, share_cell

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


def ifeval(
    source: Annotated[
        Path, typer.Argument(help="Completions of IFEval's prompts: a folder or a Parquet file.")
    ],
    instructions: Annotated[
        str, typer.Option(help="IFEval's table: input_data.jsonl, a datasets folder or a hub id.")
    ] = "google/IFEval",
    storage: Storage = None,
    name: Name = None,
    as_json: AsJson = False,
) -> None:
    """Score completions of IFEval's prompts by its verifiable instructions."""
    from qresafe.artifacts import Run
    from qresafe.console import table
    from qresafe.stages.ifeval import read_instructions, score
    from qresafe.stages.imported import completions_of
    from qresafe.stages.runtime import read_table

    spec = file_spec(None, storage, name)
    made = completions_of(Run(spec.storage, spec.name), source)
    rows = read_table(made.path / "completions.parquet").to_pylist()
    found = score(rows, read_instructions(instructions))
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
        return
    shares = {kind: share for kind, share in found if hasattr(share, "share")}
    shown = [[kind.replace("_", ", "), str(s.n), share_cell(s)] for kind, s in shares.items()]
    table(["accuracy", "n", "%"], shown)
    for instruction, prompts in found.not_scored.items():
        typer.echo(f"{prompts} prompts not scored: no check of {instruction}")
