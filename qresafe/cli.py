"""The `qresafe` command line; each command imports what it needs when it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

from qresafe import __version__
from qresafe.commands import (
    attack,
    benchmarks,
    demo_model,
    doctor,
    experiment,
    files,
    gate,
    harness,
    judge_models,
    judging,
    patch,
    plan,
    quantizers,
    recombine,
    reproduce,
    runs,
    search,
    submit,
)
from qresafe.commands.launch import launch

app = typer.Typer(
    help="Measure and repair the loss of refusals that quantization causes in chat models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

EXPERIMENTS = "Experiments"
STAGES = "Stages: each runs what it needs before it, and reuses what is finished"
MACHINE = "This machine"

COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    EXPERIMENTS: {
        "demo": experiment.demo,
        "run": experiment.run,
        "show": experiment.show,
        "plan": plan.plan,
        "search": search.search,
        "reproduce": reproduce.reproduce,
        "submit": submit.submit,
    },
    STAGES: {
        "quantize": experiment.quantize,
        "generate": experiment.generate,
        "attack": attack.attack,
        "ifeval": harness.ifeval,
        "lm-eval": harness.lm_eval,
        "pairs": experiment.pairs,
        "export": experiment.export,
        "compare": files.compare,
        "report": experiment.report,
        "gate": gate.gate,
    },
    MACHINE: {
        "doctor": doctor.doctor,
        "benchmarks": benchmarks.benchmarks,
        "recombine": recombine.recombine,
        "quantizers": quantizers.quantizers,
    },
}
for panel, commands in COMMANDS.items():
    for name, command in commands.items():
        app.command(name, rich_help_panel=panel)(command)
app.add_typer(judging.app, name="judge", rich_help_panel=STAGES)
app.add_typer(patch.app, name="patch", rich_help_panel=STAGES)
app.add_typer(judge_models.app, name="score", rich_help_panel=EXPERIMENTS)
app.add_typer(runs.app, name="runs", rich_help_panel=EXPERIMENTS)
app.add_typer(demo_model.app, name="demo-model", rich_help_panel=MACHINE)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Measure and repair the loss of refusals that quantization causes in chat models."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line; the exit codes are `launch`'s."""
    launch(app, arguments)


if __name__ == "__main__":
    main()
