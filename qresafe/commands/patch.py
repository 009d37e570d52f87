"""`qresafe patch CONFIG` trains a patch; `apply`, `revert` and `verify` handle *.qpatch files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from qresafe.commands import experiment
from qresafe.commands.groups import RunByDefault
from qresafe.commands.options import AsJson

app = typer.Typer(cls=RunByDefault, no_args_is_help=True, pretty_exceptions_enable=False)

Patch = Annotated[Path, typer.Argument(help="A .qpatch file.")]
Checkpoint = Annotated[Path, typer.Argument(help="The checkpoint's folder, or .gguf file.")]
Out = Annotated[
    Path,
    typer.Argument(help="The folder (for a .gguf file: the file) to write; it must not exist."),
]


@app.callback()
def group() -> None:
    """Train the masked low-rank update on the pairs (CONFIG), or handle a *.qpatch file."""


app.command("run")(experiment.patch)


@app.command()
def apply(patch: Patch, q0: Checkpoint, out: Out, as_json: AsJson = False) -> None:
    """Write Q = Q0 + patch to a new folder, after checking that the patch is made for Q0."""
    from qresafe.stages.qpatch import apply as apply_patch

    _tell(apply_patch(patch, q0, out), as_json)


@app.command()
def revert(patch: Patch, q: Checkpoint, out: Out, as_json: AsJson = False) -> None:
    """Write Q0 = Q - patch to a new folder: Q0's files, byte for byte."""
    from qresafe.stages.qpatch import revert as revert_patch

    _tell(revert_patch(patch, q, out), as_json)


@app.command()
def verify(patch: Patch, checkpoint: Checkpoint, as_json: AsJson = False) -> None:
    """Say whether a checkpoint is the patch's Q0, its Q, or neither (exit code 2)."""
    from qresafe.stages.qpatch import verify as verify_patch

    _tell(verify_patch(patch, checkpoint), as_json)


def _tell(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result, indent=1))
        return
    for key, value in result.items():
        typer.echo(f"{key}: {value}")
