"""Where a search lives: <storage>/runs/<name>/search/<key>/."""

from __future__ import annotations

from collections.abc import Sequence

import yaml
from upath import UPath

from qresafe.artifacts import Run, write_text
from qresafe.errors import SpecError
from qresafe.redaction import redact_data
from qresafe.search_spec import Search
from qresafe.stages.search.ledger import Row, write_trials
from qresafe.stages.search.selection import objectives, pareto_front, winner
from qresafe.stages.search.values import row_values
from qresafe.storage import children

STOPPED = "stopped"  # holds the reason, if three failures of a kind ended the search
TRIALS = "trials.parquet"
BEST = "best.yaml"
FRONT = "front"  # folder of one spec per trial of the Pareto front
CONFIRMATION = "confirmation.json"
REPORT = "report.html"
SESSIONS = "sessions.jsonl"  # a line for each run of Tune: where its time went


def search_folder(search: Search) -> UPath:
    """Return a search's folder, whether it is there or not."""
    spec = search.validation
    return Run(spec.storage, spec.name).folder("search", search.key)


def require_begun(search: Search) -> None:
    """Refuse to resume what has never begun.

    Raises:
        SpecError: There is no row and no artefact of this very search.
    """
    folder = search_folder(search)
    if not folder.exists():
        remedy = "leave out --resume, or give the same space, --set, --name and --storage as then"
        raise SpecError("there is no such search to resume", where=str(folder), remedy=remedy)


def write_results(search: Search, rows: Sequence[Row]) -> Row | None:
    """Write trials.parquet, best.yaml and front/*.yaml; return the winner, if there is one.

    Args:
        search: The search.
        rows: All rows, by index.
    """
    folder, spec = search_folder(search), search.spec
    folder.mkdir(parents=True, exist_ok=True)
    write_trials(folder / TRIALS, rows, [row_values(search, row) for row in rows])
    (folder / FRONT).mkdir(exist_ok=True)
    for old in children(folder / FRONT):
        old.unlink()
    for row in pareto_front(rows, spec):
        write_text(folder / FRONT / f"trial-{row.index:03d}.yaml", spec_text(search, row))
    best = winner(rows, spec)
    if best is not None:
        write_text(folder / BEST, spec_text(search, best))
    return best


def spec_text(search: Search, row: Row) -> str:
    """Return a trial's experiment, on the test prompts, as YAML that `qresafe patch` takes."""
    values = objectives(row, search.spec) or []
    named = zip((o.metric for o in search.spec.objectives), values, strict=True)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in named)
    head = f"# Trial {row.index} of search {search.spec.name}. On validation prompts: {shown}.\n"
    data = search.best(row.params).model_dump(mode="json")
    return head + yaml.safe_dump(redact_data(data), sort_keys=False)
