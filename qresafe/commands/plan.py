"""`qresafe plan`: memory, time and cost of an experiment before it runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qresafe.commands.options import AsJson, Config, Overrides, Workers, experiment

if TYPE_CHECKING:
    from qresafe.planning.plan import Plan, StagePlan

ON = Annotated[
    str | None,
    typer.Option(metavar="4xA100-40", help="What to plan for; default: what this machine has."),
]


def plan(
    config: Config,
    cluster: ON = None,
    hardware: Annotated[
        Path | None, typer.Option(help="A file of GPUs and prices instead of the packaged one.")
    ] = None,
    overrides: Overrides = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Print memory per GPU, time and cost of every stage; exit code 2 if it cannot fit.

    Nothing is downloaded: shapes come from a local folder or a table of known models.
    """
    from qresafe.dist.capacity import found_cluster
    from qresafe.planning.bases import bases
    from qresafe.planning.fitting import require_fit
    from qresafe.planning.hardware import hardware as read_hardware
    from qresafe.planning.hardware import parse_cluster
    from qresafe.planning.plan import make_plan
    from qresafe.planning.shapes import shape_of

    spec = experiment(config, overrides, workers=workers)
    known = read_hardware(hardware) if hardware else read_hardware()
    on = parse_cluster(cluster, known) if cluster else found_cluster(spec.resources, known)
    made = make_plan(spec, shape_of(spec.model), on)
    choice = bases(spec, made)
    if as_json:
        ways = {} if choice is None else {"codes": asdict(choice)}
        typer.echo(json.dumps(made.as_data() | ways, indent=1))
    else:
        _tell(made, known.as_of)
        if choice is not None:
            typer.echo(choice.text)
    require_fit(spec, made)


def _tell(made: Plan, as_of: str) -> None:
    from qresafe.console import duration, table
    from qresafe.planning.hardware import GIB
    from qresafe.planning.memory import PARTS

    shape = made.shape
    typer.echo(f"{shape.name}: {shape.parameters / 1e9:.3g} B weights, on {made.cluster.text}")
    used = [part for part in PARTS if any(stage.parts.get(part) for stage in made.stages)]
    rows = [
        [
            stage.name + ("" if stage.measured else " *"),
            *(_gib(stage.parts.get(part, 0.0)) for part in used),
            f"{stage.bytes / GIB:.1f}",
            "" if stage.fits else "no",
            duration(stage.seconds),
            _dollars(stage, made),
        ]
        for stage in made.stages
    ]
    table(["GiB per device", *used, "sum", "fits", "time", "USD"], rows)
    unit = "GPU" if made.cluster.device == "gpu" else "process"
    room = made.cluster.memory / GIB
    typer.echo(
        f"\n{room:.1f} GiB per {unit}; {duration(made.seconds)}, "
        f"{made.device_hours:.1f} {unit}-hours, USD {made.cost:.0f} (prices of {as_of})"
    )
    typer.echo("Times rest on assumed utilisations and longest answers; * memory not measured yet.")


def _gib(size: float) -> str:
    from qresafe.planning.hardware import GIB

    return f"{size / GIB:.1f}" if size else ""


def _dollars(stage: StagePlan, made: Plan) -> str:
    if stage.beside:  # paid with the stage before
        return ""
    return f"{made.cluster.count * made.cluster.price * stage.seconds / 3600:.1f}"
