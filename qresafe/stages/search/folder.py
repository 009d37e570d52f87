"""Where a search lives: <storage>/runs/<name>/search/<key>/."""

from __future__ import annotations

from upath import UPath

from qresafe.artifacts import Run
from qresafe.errors import SpecError
from qresafe.search_spec import Search

STOPPED = "stopped"  # holds the reason, if three failures of a kind ended the search
TRIALS = "trials.parquet"
BEST = "best.yaml"
FRONT = "front"  # folder of one spec per trial of the Pareto front
CONFIRMATION = "confirmation.json"
REPORT = "report.html"


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
