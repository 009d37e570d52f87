"""Whole experiments (`run`, `demo`, `show`) and their stages, all through one runner."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from qresafe.commands.options import (
    AsJson,
    Config,
    Name,
    Overrides,
    Storage,
    Workers,
    experiment,
)
from qresafe.commands.running import Arms, execute, wanted
from qresafe.redaction import redact_data


class Scenario(StrEnum):
    """What takes the refusals away: fine-tuning on a few harmful chats, or two bits a weight."""

    finetune = "finetune"
    int2 = "int2"


WITH_PATCH = {"patch", "export", "compare", "report"}  # the whole path, all of which must fit
PRESETS = {Scenario.finetune: "demo", Scenario.int2: "demo-int2"}


def demo(
    scenario: Annotated[
        Scenario, typer.Option(help="What takes the refusals away.")
    ] = Scenario.finetune,
    seed: Annotated[int, typer.Option(min=0, help="Of quantization, pairs and patch.")] = 0,
    overrides: Overrides = None,
    workers: Workers = None,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Take the whole path on a small model of our own: minutes on two cores, no download."""
    seeds = [f"{part}.seed={seed}" for part in ("quantize", "pairs", "patch")] if seed else []
    spec = experiment(
        PRESETS[scenario],
        [*seeds, *(overrides or [])],
        workers=workers,
        storage=storage,
        name=f"{PRESETS[scenario]}-seed{seed}" if seed else None,
    )
    execute(spec, wanted("report"), as_json=as_json, room=True)


def show(
    config: Config,
    overrides: Overrides = None,
    workers: Workers = None,
    storage: Storage = None,
    name: Name = None,
    as_json: AsJson = False,
) -> None:
    """Print the resolved experiment, with every default, as YAML that `run` accepts."""
    spec = experiment(config, overrides, workers=workers, storage=storage, name=name)
    data = spec.model_dump(mode="json")
    if as_json:
        typer.echo(json.dumps(data, indent=1))
        return
    import yaml

    typer.echo(yaml.safe_dump(redact_data(data), sort_keys=False), nl=False)


def generate(
    config: Annotated[
        str | None, typer.Argument(help="A YAML file or a preset; default: all defaults.")
    ] = None,
    arms: Arms = None,
    model: Annotated[
        str | None, typer.Option(help="Use this model as W: a folder or a hub id.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Use these prompts: CSV, JSONL or Parquet.")
    ] = None,
    column: Annotated[str | None, typer.Option(help="The column of --prompts to use.")] = None,
    overrides: Overrides = None,
    workers: Workers = None,
    storage: Storage = None,
    name: Name = None,
    as_json: AsJson = False,
) -> None:
    """Let arms of an experiment (default: W) answer its evaluation prompts."""
    own = [f"model.path={json.dumps(model)}"] if model else []
    if prompts:
        chosen = {"benchmark": "prompts", "path": str(prompts), "column": column}
        own.append(f"evaluate.prompts={json.dumps([chosen])}")
    name = name or (None if config else "files")
    overrides = [*own, *(overrides or [])]
    spec = experiment(config, overrides, workers=workers, storage=storage, name=name)
    execute(spec, wanted("generate", arms or ["W"]), as_json=as_json)


def _up_to(stage: str, summary: str) -> Callable[..., None]:
    """Return the command that runs an experiment up to and with `stage`."""

    def command(
        config: Config,
        overrides: Overrides = None,
        workers: Workers = None,
        storage: Storage = None,
        name: Name = None,
        as_json: AsJson = False,
    ) -> None:
        spec = experiment(config, overrides, workers=workers, storage=storage, name=name)
        execute(spec, wanted(stage), as_json=as_json, room=stage in WITH_PATCH)

    command.__doc__ = summary
    return command


run = _up_to("report", "Run a whole experiment: W, Q0, pairs, patch, export, compare, report.")
quantize = _up_to("quantize", "Make Q0, the low-bit checkpoint, and its full-precision control.")
pairs = _up_to("pairs", "Let W and Q0 answer the calibration pool; keep what they differ in.")
patch = _up_to("patch", "Train the masked low-rank update on the pairs.")
export = _up_to("export", "Write Q in Q0's own format, and the difference as patch.qpatch.")
report = _up_to("report", "Write report.html, report.json and model_card.md.")
