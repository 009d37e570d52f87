"""The options that commands share, and the experiment that they describe."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from qresafe.presets import load_experiment, preset_names
from qresafe.specs import ExperimentSpec

Config = Annotated[
    str,
    typer.Argument(help=f"A YAML file, or a preset: {', '.join(preset_names())}."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. patch.mask.tau=0.4."),
]
Workers = Annotated[
    int | None,
    typer.Option(help="Ray workers; 0 runs every stage in this process, without Ray."),
]
Storage = Annotated[
    str | None,
    typer.Option(help="Where runs/ lives: a local folder, or a URL such as s3://bucket/path."),
]
Name = Annotated[str | None, typer.Option(help="The run's name under <storage>/runs/.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on stdout (progress: stderr).")
]


def experiment(
    config: str | None,
    overrides: list[str] | None = None,
    *,
    workers: int | None = None,
    storage: str | None = None,
    name: str | None = None,
) -> ExperimentSpec:
    """Return the experiment that the shared options describe.

    Args:
        config: A YAML file's path or a preset's name; None starts from the defaults alone.
        overrides: The values of `--set`.
        workers: Of `--workers`; it and the following win over `--set`.
        storage: Of `--storage`.
        name: Of `--name`.

    Raises:
        SpecError: The config is missing, or a key or value is not accepted.
    """
    given = with_shortcuts(overrides, workers=workers, storage=storage, name=name)
    return load_experiment(config, given)


def with_shortcuts(
    overrides: list[str] | None,
    *,
    workers: int | None = None,
    storage: str | None = None,
    name: str | None = None,
) -> list[str]:
    """Return the values of `--set` and, after them, what the shared options say in their words."""
    shortcuts = {"resources.workers": workers, "storage": storage, "name": name}
    # JSON is YAML, so a quoted string stays one ("--name 007").
    given = [f"{key}={json.dumps(value)}" for key, value in shortcuts.items() if value is not None]
    return [*(overrides or []), *given]
