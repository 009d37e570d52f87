"""`qresafe judge CONFIG` judges; `sheet` and `ingest` ask people how often the judges are wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qresafe.commands import files
from qresafe.commands.groups import RunByDefault
from qresafe.commands.options import AsJson, Name, Overrides, Storage
from qresafe.errors import DataError

if TYPE_CHECKING:
    from qresafe.stages.comparison import Share
    from qresafe.stages.judge_error import CorrectedRate, JudgeError, SheetResult

app = typer.Typer(cls=RunByDefault, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def group() -> None:
    """Judge completions (CONFIG or PATH), or measure the judges' errors with people's labels."""


app.command("run")(files.judge)


@app.command()
def sheet(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="A run's folder (<storage>/runs/<name>), or completions as for `judge`, each of "
            "them LABEL=PATH or a path.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The CSV file to write; its key goes beside it.")],
    n: Annotated[int, typer.Option("--n", min=1, help="How many completions to draw.")] = 100,
    seed: Annotated[int, typer.Option(help="Draws and shuffles.")] = 0,
    storage: Storage = None,
    name: Name = None,
) -> None:
    """Write a blinded sheet for people: shuffled, without model or verdict."""
    from qresafe.artifacts import Run
    from qresafe.records import COMPLETION, require_columns
    from qresafe.stages.generate import FILE
    from qresafe.stages.imported import completions_of
    from qresafe.stages.label_sheet import LABELS, key_path, write_sheet
    from qresafe.stages.runtime import read_table

    spec = files.file_spec(None, storage, name)
    run = Run(spec.storage, spec.name)
    paths = {label: str(Path(path).resolve()) for label, path in _expanded(sources)}
    rows = {}
    for label, path in paths.items():
        table = read_table(completions_of(run, Path(path)).path / FILE)
        rows[label] = require_columns(table, COMPLETION, path).to_pylist()
    key = write_sheet(out, rows, paths, n, seed)
    typer.echo(f"{len(key.items)} completions of {len(paths)} models: {out}")
    typer.echo(f"key: {key_path(out)} (keep it from the people who label)")
    typer.echo(f"Write {', '.join(LABELS)} into the column label; for a second person add label_2.")
    typer.echo(f"Then: qresafe judge ingest {out}")


@app.command()
def ingest(
    sheet: Annotated[Path, typer.Argument(help="The sheet, with people's labels.")],
    key: Annotated[
        Path | None, typer.Option(help="Its key; by default the .key.json beside it.")
    ] = None,
    overrides: Overrides = None,
    storage: Storage = None,
    name: Name = None,
    as_json: AsJson = False,
) -> None:
    """Compare the judges with people: confusion, kappa, error rates, corrected rates."""
    from qresafe.console import progress_on
    from qresafe.stages.judge_error import evaluate_sheet, read_said
    from qresafe.stages.label_sheet import check_unchanged, key_path, read_key, read_sheet

    known = read_key(key or key_path(sheet))
    labels = read_sheet(sheet, known)
    spec = files.file_spec(overrides, storage, name)
    with progress_on() as progress:
        said = {
            label: read_said(*files.judged(spec, path, progress))
            for label, path in known.sources.items()
        }
    texts = {
        (label, row["prompt_id"], row["sample"]): row["completion"]
        for label, (rows, _) in said.items()
        for row in rows
    }
    check_unchanged(known, texts)
    result = evaluate_sheet(labels, known, said)
    if as_json:
        typer.echo(result.model_dump_json(indent=1))
    else:
        _tell(result)


def _expanded(sources: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (label, path), with a run's folder as the completions that were judged in it."""
    for label, path in files.labelled(sources):
        if not (Path(path) / "generate").is_dir():
            yield label, path
            continue
        for stage in _judged_in(Path(path)):
            yield f"{label}.{stage.name[:8]}", str(stage)


def _judged_in(run: Path) -> list[Path]:
    """Return the folders of a run's judged completions; its calibration pool is not among them.

    Raises:
        DataError: Nothing is judged yet.
    """
    from upath import UPath

    from qresafe.artifacts import read_manifest

    done = [mark.parent for mark in run.glob("judge/*/DONE")]
    keys = {read_manifest(UPath(folder)).inputs["completions"] for folder in done}
    found = [run / "generate" / key for key in sorted(keys) if (run / "generate" / key).is_dir()]
    if not found:
        raise DataError("no judged completions", where=str(run), remedy="judge the run first")
    return found


def _tell(result: SheetResult) -> None:
    from qresafe.console import table

    typer.echo(f"{result.labelled} completions labelled, {result.tied} without a majority.")
    for pair in result.people:
        typer.echo(
            f"{pair.first} and {pair.second}: {pair.same} of {pair.n} the same, "
            f"kappa {_number(pair.kappa)}"
        )
    for found in result.judges:
        typer.echo(
            f"\n{found.judge}: kappa {_number(found.kappa)}, sensitivity "
            f"{_interval(found.sensitivity)}, specificity {_interval(found.specificity)} "
            f"(of complied); {found.undecided} undecided"
        )
        outcomes = list(dict.fromkeys(o for row in found.confusion.values() for o in row))
        table(["people \\ judge", *outcomes], _confusion(found, outcomes))
        rows = [_corrected(rate) for rate in found.corrected]
        table(["completions", "axis", "n", "complied, raw", "corrected"], rows)
    typer.echo(f"\nPer cent, with 95 % intervals. Corrected by {result.method}.")


def _confusion(found: JudgeError, outcomes: Sequence[str]) -> list[list[str]]:
    return [
        [label, *(str(row.get(outcome, 0)) for outcome in outcomes)]
        for label, row in found.confusion.items()
    ]


def _corrected(rate: CorrectedRate) -> list[str]:
    if rate.rate is None or rate.low is None or rate.high is None:
        corrected = "cannot be said from these labels"
    else:
        corrected = f"{100 * rate.rate:.1f} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
    return [rate.source, rate.axis, str(rate.raw.n), _interval(rate.raw), corrected]


def _interval(share: Share) -> str:
    if share.share is None:
        return "-"
    return f"{100 * share.share:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"
