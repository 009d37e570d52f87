"""`qresafe recombine`: a calibration pool, and prompts crossed from those that it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qresafe.commands.options import experiment
from qresafe.errors import DataError

SUFFIXES = (".csv", ".jsonl", ".json", ".parquet")  # of pools; else it is an experiment


def recombine(
    source: Annotated[
        str,
        typer.Argument(
            metavar="POOL",
            help="A file with columns prompt and axis (harmful, benign, borderline), or an "
            "experiment (YAML or preset) whose pool is meant.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="A .jsonl file to write.")],
    count: Annotated[int, typer.Option(min=1, help="Recombined prompts to make.")] = 800,
    seed: Annotated[int, typer.Option(help="Of the choice.")] = 0,
) -> None:
    """Add recombined prompts to a pool: starts of one kind joined to ends of another.

    The patch learns from W's own answers to them where W draws the line between what it refuses
    and what it answers. Use the file as pairs.path.
    """
    from qresafe.artifacts import write_text
    from qresafe.stages.prompts import calibration_prompts
    from qresafe.stages.recombine import by_kind
    from qresafe.stages.recombine import recombine as crossed

    if out.suffix != ".jsonl":
        raise DataError(f"a pool is written as .jsonl, not {out.name!r}", remedy="rename --out")
    is_file = source.lower().endswith(SUFFIXES)
    spec = experiment(None if is_file else source).pairs
    changes = {"path": source, "prompts": ()} if is_file else {"recombined": 0}
    table = calibration_prompts(spec.model_copy(update=changes))
    rows = list(zip(table["axis"].to_pylist(), table["prompt"].to_pylist(), strict=True))
    rows += [("recombined", text) for text in crossed(by_kind(rows), count, seed)]
    lines = [json.dumps({"prompt": text, "axis": kind}, ensure_ascii=False) for kind, text in rows]
    write_text(out, "\n".join(lines) + "\n")
    typer.echo(f"{out}: {len(rows)} prompts, {count} of them recombined; use it as pairs.path")
