"""`qresafe doctor`: preflight checks, before a run finds out the hard way."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qresafe.commands.options import AsJson, Overrides, Storage, Workers, experiment

if TYPE_CHECKING:
    from qresafe.dist.preflight import Check

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def doctor(
    config: Annotated[
        str, typer.Argument(help="The experiment to prepare for: a YAML file or a preset.")
    ] = "demo",
    overrides: Overrides = None,
    workers: Workers = None,
    storage: Storage = None,
    ray: Annotated[
        bool, typer.Option("--ray/--no-ray", help="Also look from inside a Ray worker (10 s).")
    ] = True,
    working_dir: Annotated[
        Path, typer.Option(help="What `ray job submit --working-dir` would upload.")
    ] = Path(),
    as_json: AsJson = False,
) -> None:
    """Check versions, hardware, storage and Ray; exit code 1 when something must be mended."""
    from qresafe.dist.preflight import checks

    spec = experiment(config, overrides, workers=workers, storage=storage)
    found = list(_shown(checks(spec, working_dir, ray=ray), quiet=as_json))
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(check) for check in found], indent=1))
    if any(check.status == "fail" for check in found):
        raise typer.Exit(1)


def _shown(checks: Iterator[Check], quiet: bool) -> Iterator[Check]:
    for check in checks:
        yield check
        if quiet:
            continue
        typer.secho(f"{check.status:<5}", fg=_COLOURS[check.status], bold=True, nl=False)
        typer.echo(f"{check.name:<22} {check.detail}")
        if check.remedy:
            typer.echo(f"{'':<27} -> {check.remedy}")
