"""How a command line ends: a mistake in one sentence, a bug with all that helps to mend it."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from typing import NoReturn

import typer

from qresafe.errors import UserError, causes
from qresafe.redaction import redacted_output

INTERRUPTED = 130  # the shell's code for Ctrl-C
RESUME = "interrupted: give the same command again to continue (what is finished is kept)"
REPORT = (
    "This is a bug in qresafe. Please report it with the lines above and the output of "
    "`qresafe doctor --json`."
)


def launch(app: typer.Typer, arguments: list[str] | None = None) -> NoReturn:
    """Run `app` on the command line and leave the process with a meaningful exit code.

    0: done; 1: a bug; 2: a mistake in the command line or its inputs; 130: interrupted.
    """
    quiet_libraries()
    warnings.formatwarning = _plain
    with redacted_output():
        sys.exit(_ended(app, arguments))


def _ended(app: typer.Typer, arguments: list[str] | None) -> int:
    """Run `app` and return the exit code that it ends with."""
    try:
        app(arguments)
    except SystemExit as leaving:
        if leaving.code == INTERRUPTED:
            _say("", RESUME)
        raise
    except Exception as error:
        mistake = user_error(error)
        if mistake is None:
            traceback.print_exc()
            _say("", REPORT)
            return 1
        _say("error: ", str(mistake))
        return mistake.exit_code
    return 0


def quiet_libraries() -> None:
    """Keep the libraries' own bars and notices, which would tear the display, to themselves.

    Workers inherit the environment.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # DeepSpeed sets its logger's level itself, but leaves filters alone.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


def _plain(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Return a warning to the user without the line of code that it comes from."""
    if category is UserWarning:
        return f"warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def user_error(error: BaseException | None) -> UserError | None:
    """Return the mistake that `error` is or was raised from (Ray wraps what workers raise)."""
    return next((cause for cause in causes(error) if isinstance(cause, UserError)), None)


def _say(label: str, text: str) -> None:
    sys.stdout.flush()
    typer.secho(label, fg="red", bold=True, nl=False, err=True)
    typer.echo(text, err=True)
