"""`qresafe search SPACE`: many patches, the best specs, what mattered, and the proof."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qresafe.commands.options import AsJson, Name, Overrides, Storage, Workers

if TYPE_CHECKING:
    from qresafe.search_spec import Search

SpaceFile = Annotated[
    str, typer.Argument(help="A YAML file, or the name of one in tune_spaces/, e.g. quick-cpu.")
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Continue; a mistake if there is nothing to continue."),
]
Show = Annotated[
    bool, typer.Option("--show", help="Print the trials so far, also of a search that is running.")
]


def search(
    space: SpaceFile,
    overrides: Overrides = None,
    workers: Workers = None,
    storage: Storage = None,
    name: Name = None,
    resume: Resume = False,
    show: Show = False,
    as_json: AsJson = False,
) -> None:
    """Search a space of specs on Ray Tune; what is finished is reused, so it can be continued."""
    found = load(space, overrides, workers=workers, storage=storage, name=name)
    found = found.at(absolute(found.experiment.storage))
    execute(found, resume=resume, show=show, as_json=as_json)


def load(
    space: str,
    overrides: list[str] | None,
    *,
    workers: int | None = None,
    storage: str | None = None,
    name: str | None = None,
) -> Search:
    """Return the search that the options describe; the named options win over `--set`."""
    from qresafe.search_spec import load_search

    shortcuts = {"resources.workers": workers, "storage": storage, "name": name}
    given = [f"{key}={json.dumps(value)}" for key, value in shortcuts.items() if value is not None]
    return load_search(space, [*(overrides or []), *given])


def absolute(storage: str) -> str:
    """Return a storage that processes with other working directories find too."""
    from upath import UPath

    from qresafe.artifacts import is_local

    return str(Path(storage).expanduser().absolute()) if is_local(UPath(storage)) else storage


def execute(found: Search, *, resume: bool, show: bool, as_json: bool) -> None:
    """Run a search, or only show its trials, and tell of it on stdout."""
    from qresafe.stages.search.folder import require_begun

    if resume or show:
        require_begun(found)
    if not show:
        run(found)
    if as_json:
        typer.echo(json.dumps(as_data(found), indent=1))
    else:
        tell(found)


def run(found: Search) -> None:
    """Check a search and run it to its end."""
    from qresafe.console import progress_on
    from qresafe.stages.search.check import check_search

    check_search(found)  # before Ray starts: a mistake should cost a second, not ten
    from qresafe.dist.search import run_search
    from qresafe.dist.trackers import check_trackers

    check_trackers(found)
    with progress_on() as progress:
        run_search(found, progress)


def as_data(found: Search) -> dict[str, Any]:
    """Return what `--json` prints: all rows, the front, the winner and the confirmation."""
    from qresafe.stages.search.confirm import read_confirmation
    from qresafe.stages.search.folder import BEST, CONFIRMATION, REPORT, TRIALS, search_folder
    from qresafe.stages.search.ledger import Ledger
    from qresafe.stages.search.proposers import trial_count
    from qresafe.stages.search.selection import pareto_front, winner

    folder = search_folder(found)
    rows = list(Ledger(folder).read().values())
    best = winner(rows, found.spec)
    return {
        "folder": str(folder),
        "ended": len(rows),
        "trials": trial_count(found),
        "rows": [row.model_dump(mode="json") for row in rows],
        "front": [row.index for row in pareto_front(rows, found.spec)],
        "winner": best.index if best else None,
        "confirmation": [c.model_dump() for c in read_confirmation(folder / CONFIRMATION)],
        "files": {
            name: str(folder / name) for name in (TRIALS, BEST, REPORT) if (folder / name).exists()
        },
    }


def tell(found: Search) -> None:
    """Print the trials as a table, and where the files are."""
    from qresafe.console import table
    from qresafe.stages.search.ledger import Row

    data = as_data(found)
    rows = [Row.model_validate(row) for row in data["rows"]]
    keys = [parameter.key for parameter in found.space]
    names = [objective.metric for objective in found.spec.objectives]
    header = ["trial", "status", *(key.rpartition(".")[2] for key in keys), *names]
    table(header, [_line(found, row, keys, names, data) for row in rows])
    ended = f"{data['ended']} of {data['trials']} trials have ended"
    typer.echo(f"\n{ended}; * on the Pareto front, ** the winner")
    for row in rows:
        if row.status != "completed" and row.same_as is None:
            typer.echo(f"trial {row.index} {row.status}: {row.reason}")
    for name, path in data["files"].items():
        typer.echo(f"{name}: {path}")


def _line(
    found: Search, row: Any, keys: list[str], names: list[str], data: dict[str, Any]
) -> list[str]:
    from qresafe.stages.search.values import row_values

    mark = "*" * ((row.index in data["front"]) + (row.index == data["winner"]))
    status = row.status if row.same_as is None else f"as {row.same_as}"
    values = row_values(found, row)
    shown = [_short(values.get(key)) for key in keys]
    return [f"{row.index}{mark}", status, *shown, *(_short(row.metrics.get(n)) for n in names)]


def _short(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
