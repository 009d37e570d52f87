"""`qresafe patch CONFIG` trains a patch; the other commands handle *.qpatch files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from qresafe.commands import experiment
from qresafe.commands.groups import RunByDefault
from qresafe.commands.options import AsJson
from qresafe.errors import DataError, SignatureError, SpecError

app = typer.Typer(cls=RunByDefault, no_args_is_help=True, pretty_exceptions_enable=False)

Patch = Annotated[Path, typer.Argument(help="A .qpatch file.")]
Checkpoint = Annotated[Path, typer.Argument(help="The checkpoint's folder, or .gguf file.")]
Out = Annotated[
    Path,
    typer.Argument(help="The folder (for a .gguf file: the file) to write; it must not exist."),
]
PublicKey = Annotated[
    Path | None,
    typer.Option(
        envvar="QRESAFE_PUBLIC_KEY", help="Refuse a patch that this key did not sign (*.pub)."
    ),
]
Signed = Annotated[
    bool,
    typer.Option("--require-signature", help="Refuse to go on where no public key is given."),
]
Passphrase = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file", help="Holds the key's passphrase; default: $QRESAFE_KEY_PASSPHRASE."
    ),
]
PASSPHRASE = "QRESAFE_KEY_PASSPHRASE"


@app.callback()
def group() -> None:
    """Train the masked low-rank update on the pairs (CONFIG), or handle a *.qpatch file."""


app.command("run")(experiment.patch)


@app.command()
def apply(
    patch: Patch,
    q0: Checkpoint,
    out: Out,
    public_key: PublicKey = None,
    require_signature: Signed = False,
    as_json: AsJson = False,
) -> None:
    """Write Q = Q0 + patch to a new folder, after checking that the patch is made for Q0."""
    from qresafe.stages.qpatch import apply as apply_patch

    _check_signature(patch, public_key, require_signature)
    _tell(apply_patch(patch, q0, out), as_json)


@app.command()
def revert(
    patch: Patch,
    q: Checkpoint,
    out: Out,
    public_key: PublicKey = None,
    require_signature: Signed = False,
    as_json: AsJson = False,
) -> None:
    """Write Q0 = Q - patch to a new folder: Q0's files, byte for byte."""
    from qresafe.stages.qpatch import revert as revert_patch

    _check_signature(patch, public_key, require_signature)
    _tell(revert_patch(patch, q, out), as_json)


@app.command()
def verify(
    patch: Patch,
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A checkpoint's folder; none: only the signature.")
    ] = None,
    public_key: PublicKey = None,
    as_json: AsJson = False,
) -> None:
    """Say whether a key signed the patch, and whether a checkpoint is its Q0 or its Q.

    Exit code 2 if a signature is bad or missing, or a checkpoint is neither.
    """
    if checkpoint is None and public_key is None:
        raise SpecError("nothing to verify", remedy="give a CHECKPOINT, a --public-key, or both")
    told = _check_signature(patch, public_key)
    if checkpoint is not None:
        from qresafe.stages.qpatch import verify as verify_patch

        told |= verify_patch(patch, checkpoint)
    _tell(told, as_json)


@app.command()
def keygen(
    key: Annotated[Path, typer.Argument(help="The private key's file; KEY.pub is for others.")],
    passphrase_file: Passphrase = None,
    as_json: AsJson = False,
) -> None:
    """Make a key pair for signing patches; only its owner may read KEY."""
    from qresafe.signing import generate_key

    made = generate_key(key, _passphrase(passphrase_file))
    _tell({"private": str(key), "public": f"{key}.pub", "fingerprint": made}, as_json)


@app.command()
def sign(
    patch: Patch,
    key: Annotated[Path, typer.Option(help="The private key's file.")],
    passphrase_file: Passphrase = None,
    as_json: AsJson = False,
) -> None:
    """Write PATCH.sig, by which others can check that the patch is yours."""
    from qresafe.signing import sign as sign_patch

    target, made = sign_patch(patch, key, _passphrase(passphrase_file))
    _tell({"signature": str(target), "key": made.key, "sha256": made.sha256}, as_json)


def _passphrase(file: Path | None) -> bytes | None:
    """Return the passphrase of a file's first line or of the environment; None: there is none."""
    if file is None:
        return os.environ.get(PASSPHRASE, "").encode() or None
    if not file.is_file():
        raise DataError("no such file", where=str(file), remedy="give the passphrase's file")
    with file.open("rb") as lines:
        return lines.readline(4096).rstrip(b"\r\n") or None


def _check_signature(
    patch: Path, public_key: Path | None, required: bool = False
) -> dict[str, Any]:
    """Return who signed a patch, where a key is given; refuse it if it did not, or if none is."""
    if public_key is None and required:
        remedy = "give --public-key, or set QRESAFE_PUBLIC_KEY"
        raise SignatureError("no key to check the signature with", where=str(patch), remedy=remedy)
    if public_key is None:
        return {}
    from qresafe.signing import verify as verify_signature

    return {"signed_by": verify_signature(patch, public_key).key}


def _tell(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result, indent=1))
        return
    for key, value in result.items():
        typer.echo(f"{key}: {value}")
