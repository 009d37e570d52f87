"""The page of a search: front, parallel coordinates, importance, curves, and the confirmation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from qresafe.artifacts import write_text
from qresafe.provenance import git_revision, hardware, versions
from qresafe.redaction import redact_data
from qresafe.search_spec import Search
from qresafe.stages.report import environment
from qresafe.stages.search import view
from qresafe.stages.search.confirm import read_confirmation
from qresafe.stages.search.folder import CONFIRMATION, REPORT, search_folder, spec_text
from qresafe.stages.search.ledger import Row
from qresafe.stages.search.metrics import METRICS_BY_NAME
from qresafe.stages.search.proposers import trial_count
from qresafe.stages.search.selection import pareto_front, winner


def write_report(search: Search, rows: Sequence[Row]) -> None:
    """Write the page into the search's folder.

    Args:
        search: The search.
        rows: All rows, by index; at least one.
    """
    page = environment().get_template("search.html.jinja").render(tell(search, rows))
    write_text(search_folder(search) / REPORT, page)


def tell(search: Search, rows: Sequence[Row]) -> dict[str, Any]:
    """Return all that the template shows."""
    spec, found = search.spec, read_confirmation(search_folder(search) / CONFIRMATION)
    best, front = winner(rows, spec), pareto_front(rows, spec)
    kinds = view.kinds(rows, best, front)
    return {
        "name": spec.name,
        "trials": trial_count(search),
        "rows": rows,
        "headline": view.headline(search, rows, best, found),
        "details": view.details(search, rows, best, front, found),
        "fronts": view.fronts(search, rows, kinds),
        "parallel": view.parallel(search, rows, kinds),
        "importance": view.importance(search, rows),
        "curves": view.curves(search, rows, kinds),
        "confirmation": view.confirmation(search, found),
        "bias": view.bias(search, best, found),
        "header": view.header(search),
        "table": view.table(search, rows, kinds),
        "reasons": [(r.index, r.status, r.reason) for r in rows if r.reason and r.same_as is None],
        "objectives": [(METRICS_BY_NAME[o.metric].title, o.weight) for o in spec.objectives],
        "constraints": [(METRICS_BY_NAME[c.metric].title, c.at_most) for c in spec.constraints],
        "best": spec_text(search, best) if best else "",
        "search": yaml.safe_dump(redact_data(spec.model_dump(mode="json")), sort_keys=False),
        "key": search.key,
        "versions": versions(),
        "hardware": hardware(),
        "git": git_revision(),
    }
