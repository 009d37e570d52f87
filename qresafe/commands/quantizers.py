"""`quantizers`: the methods that a spec may name, and what becomes of their checkpoints."""

from __future__ import annotations

import json

import typer

from qresafe.commands.options import AsJson


def quantizers(as_json: AsJson = False) -> None:
    """List the quantizers: widths, format, what loads it, patchable or not, where it ran."""
    from qresafe.console import table
    from qresafe.quantizers.catalogue import catalogue

    entries = catalogue()
    if as_json:
        typer.echo(
            json.dumps({name: told.model_dump() for name, told in entries.items()}, indent=1)
        )
        return
    head = ["method", "widths", "format", "loaded by", "calibration", "patch", "ran on"]
    rows = [
        [
            name,
            told.widths,
            told.format,
            ", ".join(told.loads),
            told.calibration,
            told.patch,
            told.ran,
        ]
        for name, told in entries.items()
    ]
    table(head, rows, words=True)
    typer.echo("\nChosen by quantize.method; `qresafe show` prints each one's settings.")
