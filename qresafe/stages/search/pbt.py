"""Population-based training of lr and beta (Jaderberg et al. 2017), generation by generation.

A member of generation g is a whole patch of (g + 1) x interval steps whose lr and beta change
where a generation begins. What it copied from a better member is that member's beginning, so its
lineage is one schedule, `patch.changes`: the best member is an ordinary spec, which `qresafe
patch` trains again to the same bits, and which goes on from its parent's checkpoint here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.random import Generator

from qresafe.errors import SpecError
from qresafe.search_space import Params
from qresafe.search_spec import Search
from qresafe.stages.search.ledger import Row
from qresafe.stages.search.selection import score

NAMES = {"patch.lr": "lr", "patch.objective.beta": "beta"}


def generations(search: Search) -> int:
    """Return how many generations fit into the patch's steps.

    Raises:
        SpecError: Not even one, or the patch counts epochs.
    """
    steps, interval = search.validation.patch.steps, search.spec.scheduler.interval
    if steps is None or steps < interval:
        remedy = "set patch.steps to a multiple of scheduler.interval"
        raise SpecError(f"pbt with intervals of {interval} steps in {steps} steps", remedy=remedy)
    return steps // interval


class PopulationProposer:
    """Proposes generation after generation, each from all rows of the one before."""

    def __init__(self, search: Search) -> None:
        self._search, self._size = search, search.spec.budget.trials
        self._steps = search.spec.scheduler.interval

    def needs(self, index: int) -> int:
        return index // self._size * self._size

    def propose(self, index: int, rows: Sequence[Row]) -> Params | None:
        generation, member = divmod(index, self._size)
        if generation == 0:
            return self._begin(index)
        before = rows[(generation - 1) * self._size : generation * self._size]
        ranked = sorted(before, key=lambda row: (score(row, self._search.spec), row.index))
        few = max(1, math.ceil(self._search.spec.scheduler.quantile * self._size))
        own = before[member]
        rng = np.random.default_rng([self._search.spec.searcher.seed, index])
        grown = own.params | {"patch.steps": (generation + 1) * self._steps}
        if self._size < 2 or own.index not in {row.index for row in ranked[-few:]}:
            return grown
        donor = ranked[int(rng.integers(few))]
        return self._copied(donor, generation, rng)

    def _begin(self, index: int) -> Params:
        rng = np.random.default_rng([self._search.spec.searcher.seed, index])
        drawn = self._search.space.draw(rng) if index else {}
        return drawn | {"patch.steps": self._steps}

    def _copied(self, donor: Row, generation: int, rng: Generator) -> Params:
        change: dict[str, Any] = {"at": generation * self._steps}
        for parameter in self._search.space:
            factor = self._search.spec.scheduler.perturb
            value = self._now(donor, parameter.key) * (factor if rng.random() < 0.5 else 1 / factor)
            low, high = parameter.bounds
            change[NAMES[parameter.key]] = float(min(high, max(low, value)))
        changes = [*donor.params.get("patch.changes", []), change]
        grown = {"patch.steps": (generation + 1) * self._steps, "patch.changes": changes}
        return donor.params | grown

    def _now(self, row: Row, key: str) -> float:
        """Return the value that a member ended with."""
        from qresafe.search_space import value_at

        latest = [c[NAMES[key]] for c in row.params.get("patch.changes", []) if NAMES[key] in c]
        start = row.params.get(key, value_at(self._search.validation, key))
        return float(latest[-1] if latest else start)


def parent(params: Params, rows: Sequence[Row], interval: int) -> Row | None:
    """Return the row whose patch is the beginning of this one, if there is such a row."""
    steps = params.get("patch.steps", 0)
    before = [c for c in params.get("patch.changes", []) if c["at"] < steps - interval]
    wanted = params | {"patch.steps": steps - interval, "patch.changes": before}
    if not before:
        wanted.pop("patch.changes")
    return next((row for row in rows if row.params == wanted and "patch" in row.keys), None)
