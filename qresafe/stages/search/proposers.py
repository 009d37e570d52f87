"""Who proposes trials. A proposal is a function of the seed, its place, and the rows before it.

No proposal depends on the order in which trials finish, so a search that was killed proposes the
same again; a trial that had ended is not run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from qresafe.search_space import Params, Space
from qresafe.search_spec import Search
from qresafe.stages.search.ledger import Row


class Proposer(Protocol):
    """Proposes trial after trial; asked for each index once, in order."""

    def needs(self, index: int) -> int:
        """Return how many of the first trials must have ended before `propose(index)`."""

    def propose(self, index: int, rows: Sequence[Row]) -> Params | None:
        """Return a trial's values, or None where there are no more.

        Args:
            index: From 0, where the experiment's own spec is proposed: {}.
            rows: The first `needs(index)` rows (or more, which are left alone).
        """


class RandomProposer:
    """Independent draws: trial i is drawn with the seed (seed, i)."""

    def __init__(self, space: Space, seed: int) -> None:
        self._space, self._seed = space, seed

    def needs(self, index: int) -> int:
        return 0

    def propose(self, index: int, rows: Sequence[Row]) -> Params | None:
        return self._space.draw(np.random.default_rng([self._seed, index])) if index else {}


class GridProposer:
    """Every combination, after the experiment's own spec."""

    def __init__(self, space: Space) -> None:
        self._points = space.grid()

    def needs(self, index: int) -> int:
        return 0

    def propose(self, index: int, rows: Sequence[Row]) -> Params | None:
        if index == 0:
            return {}
        return self._points[index - 1] if index <= len(self._points) else None


def make_proposer(search: Search) -> Proposer:
    """Return the proposer that a search asks for."""
    spec = search.spec
    if spec.scheduler.name == "pbt":
        from qresafe.stages.search.pbt import PopulationProposer

        return PopulationProposer(search)
    if spec.searcher.name == "grid":
        return GridProposer(search.space)
    if spec.searcher.name == "optuna":
        from qresafe.stages.search.optuna_proposer import OptunaProposer

        return OptunaProposer(search)
    return RandomProposer(search.space, spec.searcher.seed)


def trial_count(search: Search) -> int:
    """Return how many trials a search has at most."""
    spec = search.spec
    if spec.scheduler.name == "pbt":
        from qresafe.stages.search.pbt import generations

        return spec.budget.trials * generations(search)
    if spec.searcher.name == "grid":
        return min(spec.budget.trials, 1 + len(search.space.grid()))
    return spec.budget.trials
