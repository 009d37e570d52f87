"""`qresafe runs list | show | diff | prune`: what lies under a storage root."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qresafe.commands.options import AsJson

if TYPE_CHECKING:
    from qresafe.failure import Failure
    from qresafe.progress_file import RunProgress
    from qresafe.stages.runs import Removal, RunFolder, StageFolder

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

Root = Annotated[
    str, typer.Option("--storage", help="Where runs/ lives: a local folder, or a URL (s3://...).")
]
RunName = Annotated[str, typer.Argument(help="A run's name, as `qresafe runs list` shows it.")]
DAY = 24 * 3600


@app.callback()
def group() -> None:
    """Look at runs and their stages, compare their specs, and free their space."""


@app.command("list")
def list_runs(storage: Root = ".", as_json: AsJson = False) -> None:
    """Name every run: its state, stages, newest result and size."""
    from qresafe.console import table
    from qresafe.stages.runs import find_runs

    runs = find_runs(storage)
    if as_json:
        typer.echo(json.dumps([run_data(run) for run in runs], indent=1))
        return
    header = ["run", "state", "stages", "newest", "when (UTC)", "size"]
    table(header, [_run_row(run) for run in runs])
    for run in runs:
        if run.driver and run.progress:
            typer.echo(f"{run.name}: {'; '.join(now(run.progress)) or 'between two stages'}")


@app.command()
def show(name: RunName, storage: Root = ".", as_json: AsJson = False) -> None:
    """Name every stage of a run: its key, state, time and size; how far it is, why it failed."""
    from qresafe.console import table
    from qresafe.stages.runs import find_runs, pick

    run = pick(find_runs(storage), name)
    if as_json:
        stages = [stage_data(stage) for stage in run.stages]
        typer.echo(json.dumps(run_data(run) | {"stages": stages}, indent=1))
        return
    header = ["stage", "key", "state", "finished (UTC)", "size", "of it work files"]
    table(header, [_stage_row(stage) for stage in run.stages])
    typer.echo(f"\n{run.path}: {run.state}" + (f", {run.driver}" if run.driver else ""))
    for line in _now_or_last(run):
        typer.echo(line)


@app.command()
def diff(first: RunName, second: RunName, storage: Root = ".", as_json: AsJson = False) -> None:
    """Show where the specs of two runs differ (their newest reports, or else their stages)."""
    from qresafe.console import table
    from qresafe.stages.runs import differences, find_runs, pick

    runs = find_runs(storage)
    found = differences(pick(runs, first), pick(runs, second))
    if as_json:
        typer.echo(json.dumps({k: list(pair) for k, pair in found.items()}, indent=1))
    elif not found:
        typer.echo("the specs are equal")
    else:
        rows = [[key, *(json.dumps(value) for value in pair)] for key, pair in found.items()]
        table(["key", first, second], rows, words=True)


@app.command()
def prune(
    names: Annotated[
        list[str] | None, typer.Argument(help="Runs to prune; none: all of the storage.")
    ] = None,
    storage: Root = ".",
    whole: Annotated[
        bool, typer.Option("--whole", help="Remove the results too, not only the work files.")
    ] = False,
    older_than: Annotated[
        float | None, typer.Option(min=0, help="Days since a run's newest finished stage.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Unfinished stages too, which could be continued.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Free space: work files (parts, training checkpoints) of finished stages, or whole runs.

    It shows what would go and asks first. Unfinished stages stay without --force; a run that has
    a driver stays in any case.
    """
    from qresafe.errors import DataError
    from qresafe.stages.runs import find_runs, pick, plan_removal, remove

    if whole and not names and older_than is None:
        remedy = "name the runs, or say --older-than DAYS (0 for all)"
        raise DataError("--whole would remove every run", where=storage, remedy=remedy)
    runs = find_runs(storage)
    chosen = [pick(runs, name) for name in dict.fromkeys(names)] if names else runs
    if older_than is not None:
        chosen = [run for run in chosen if _age(run) >= older_than * DAY]
    plans = [plan_removal(run, whole=whole, force=force) for run in chosen]
    _tell(plans)
    going = [plan for plan in plans if plan.paths]
    if dry_run or not going:
        return
    if not yes:
        typer.confirm("remove this?", abort=True)
    for plan in going:
        remove(plan)
    typer.echo(f"freed {size(sum(plan.bytes for plan in going))}")


def _tell(plans: list[Removal]) -> None:
    from qresafe.console import table

    rows = []
    for plan in plans:
        what = "the whole run" if plan.paths == (plan.run.path,) else f"{len(plan.paths)} folders"
        rows.append([plan.run.name, what if plan.paths else "-", size(plan.bytes), plan.kept])
    table(["run", "would go", "size", "stays"], rows, words=True)


def run_data(run: RunFolder) -> dict[str, Any]:
    """Return what a program wants to know of a run."""
    newest = run.finished[0] if run.finished else None
    return {
        "run": run.name,
        "path": str(run.path),
        "state": run.state,
        "driver": str(run.driver) if run.driver else None,
        "finished": len(run.finished),
        "unfinished": len(run.stages) - len(run.finished),
        "newest": newest.stage if newest else None,
        "when": when(newest),
        "bytes": run.bytes,
        "progress": run.progress.model_dump() if run.progress else None,
        "failure": run.failure.model_dump() if run.failure else None,
    }


def stage_data(stage: StageFolder) -> dict[str, Any]:
    """Return what a program wants to know of a stage's folder."""
    return {
        "stage": stage.stage,
        "key": stage.key,
        "finished": when(stage),
        "bytes": stage.bytes,
        "work_bytes": stage.work_bytes,
    }


def _now_or_last(run: RunFolder) -> list[str]:
    """Return the lines that say how far a run is, or how its last command ended."""
    from qresafe.console import duration

    told = run.progress
    if told and run.driver:
        age = duration(max(0.0, time.time() - told.updated))
        return [*now(told), f"told {age} ago by process {told.process} on {told.host}"]
    if told:
        when, at = utc(told.updated), "; ".join(now(told)) or "between two stages"
        return [
            f"process {told.process} on {told.host} ended without a word after {when}: {at}",
            "that is kill -9, the kernel for want of memory, or a lost host: run it again to go on",
        ]
    return _reason(run.failure) if run.failure else []


def now(told: RunProgress) -> list[str]:
    """Return a line for each open stage: its count, speed, and what is left."""
    from qresafe.console import duration

    lines = []
    for stage in told.stages:
        of = f"/{stage.total}" if stage.total is not None else ""
        count = f"{stage.done}{of} {stage.unit}".strip() if stage.done or stage.total else ""
        speed = f"{stage.rate:.3g}/s" if stage.rate else ""
        left = f"{duration(stage.seconds_left)} left" if stage.seconds_left else ""
        words = (stage.stage, count, speed, stage.note, left)
        lines.append("  ".join(word for word in words if word))
    return lines


def _reason(failure: Failure) -> list[str]:
    where = f" in {failure.where}" if failure.where else ""
    rank = f", rank {failure.rank}" if failure.rank is not None else ""
    told = {
        "failed": f"{utc(failure.time)} in {failure.stage or 'no stage'} ({failure.kind}){rank}, "
        f"process {failure.process} on {failure.host}",
        "reason": f"{failure.what}{where}",
        "what to do": failure.hint,
        "records": ", ".join(failure.records),
        "log": failure.log,
        "trace": "".join(f"\n  {frame}" for frame in failure.trace),
    }
    return [f"{name}: {text}" for name, text in told.items() if text]


def _run_row(run: RunFolder) -> list[str]:
    newest, left = run.finished[0] if run.finished else None, len(run.stages) - len(run.finished)
    count = f"{len(run.finished)}" + (f" + {left} unfinished" if left else "")
    last = newest.stage if newest else "-"
    return [run.name, run.state, count, last, when(newest) or "-", size(run.bytes)]


def _stage_row(stage: StageFolder) -> list[str]:
    state = "unfinished" if stage.finished is None else "finished"
    sizes = [size(stage.bytes), size(stage.work_bytes)]
    return [stage.stage, stage.key, state, when(stage) or "-", *sizes]


def _age(run: RunFolder) -> float:
    """Return the seconds since a run's newest finished stage; without one, it has no age."""
    return time.time() - (run.finished[0].finished or 0.0) if run.finished else -1.0


def when(stage: StageFolder | None) -> str | None:
    """Return when a stage was finished, in UTC, to the second."""
    if stage is None or stage.finished is None:
        return None
    return utc(stage.finished)


def utc(seconds: float) -> str:
    """Return a time since 1970 in UTC, to the second."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def size(count: int) -> str:
    """Return "512 B", "1.5 KiB", ... "3.2 GiB"."""
    amount, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            break
        amount /= 1024
    return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
