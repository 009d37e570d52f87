"""`qresafe demo-model build`: the small chat model of our own, from nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qresafe.commands.options import AsJson
from qresafe.errors import ResourceError

app = typer.Typer(
    help="The small chat model that `qresafe demo` uses.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def group() -> None:
    """The small chat model that `qresafe demo` uses."""


@app.command()
def build(
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist.")],
    seed: Annotated[int, typer.Option(min=0, help="Of the weights and the order of data.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Train the model from its recipe, in minutes on two cores; a seed gives one model."""
    if out.exists():
        raise ResourceError(f"{out} exists", remedy="give a new folder, so that nothing is lost")
    from qresafe.console import progress_on
    from qresafe.embedded.build import build as build_model

    with progress_on() as progress:
        manifest = build_model(seed, out, progress=progress)
    if as_json:
        typer.echo(json.dumps({"path": str(out), **manifest}, indent=1))
    else:
        typer.echo(f"model: {out} ({manifest['parameters']} parameters)")
        typer.echo(f"use it with --set model.path={out}")
