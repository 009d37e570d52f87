"""Which trials are worth having: the Pareto front, the constraints, and one winner."""

from __future__ import annotations

from collections.abc import Sequence

from qresafe.search_spec import SearchSpec
from qresafe.stages.search.ledger import Row


def objectives(row: Row, spec: SearchSpec) -> list[float] | None:
    """Return a row's objective values in the search's order; None if one is not known."""
    values = [row.metrics.get(objective.metric) for objective in spec.objectives]
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None


def feasible(row: Row, spec: SearchSpec) -> bool:
    """Return whether a completed row keeps all constraints."""
    return all(
        (value := row.metrics.get(bound.metric)) is not None and value <= bound.at_most
        for bound in spec.constraints
    )


def candidates(rows: Sequence[Row], spec: SearchSpec) -> list[Row]:
    """Return the completed, feasible rows with all objectives, each spec once."""
    return [
        row
        for row in rows
        if row.status == "completed"
        and row.same_as is None
        and feasible(row, spec)
        and objectives(row, spec) is not None
    ]


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Return whether `a` is nowhere above `b` and somewhere below it."""
    pairs = list(zip(a, b, strict=True))
    return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)


def pareto_front(rows: Sequence[Row], spec: SearchSpec) -> list[Row]:
    """Return the candidates that no other candidate dominates, in their order."""
    valued = [(row, objectives(row, spec) or []) for row in candidates(rows, spec)]
    return [row for row, mine in valued if not any(dominates(theirs, mine) for _, theirs in valued)]


def score(row: Row, spec: SearchSpec) -> float:
    """Return the weighted sum of a row's objectives; infinite if one is not known."""
    values = objectives(row, spec)
    if values is None:
        return float("inf")
    pairs = zip(spec.objectives, values, strict=True)
    return sum(objective.weight * value for objective, value in pairs)


def winner(rows: Sequence[Row], spec: SearchSpec) -> Row | None:
    """Return the candidate with the smallest weighted sum of objectives, the first of equals."""
    found = candidates(rows, spec)
    return min(found, key=lambda row: (score(row, spec), row.index)) if found else None
