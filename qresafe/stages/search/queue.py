"""Which trial comes next: proposals, results that are known already, and when to stop."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from qresafe.errors import SpecError
from qresafe.search_space import Params
from qresafe.search_spec import Search
from qresafe.specs import ExperimentSpec
from qresafe.stages.search.ledger import Ledger, Row
from qresafe.stages.search.pbt import parent
from qresafe.stages.search.proposers import make_proposer, trial_count
from qresafe.stages.search.values import trial_key

SAME_FAILURES = 3  # of one kind end the search
# Kinds of failure that a trial of the same values meets again; what else may fail is an accident.
OWN_FAILURES = {"diverged", "out of memory", "invalid spec", "DataError", "ModelError", "SpecError"}


class Pause(Enum):
    """Why there is no next trial now."""

    WAIT = "wait"  # a running trial, or a shared stage, must end first
    END = "end"


@dataclass(frozen=True)
class Proposal:
    """A trial to run.

    Attributes:
        index: Its place in the search.
        params: What it sets.
        spec: Its whole experiment, on the validation prompts.
        peers: The rows that its scheduler may compare it with: they do not change any more.
        start: Key of the patch whose last checkpoint it goes on from.
    """

    index: int
    params: Params
    spec: ExperimentSpec
    peers: tuple[Row, ...]
    start: str | None = None


class TrialQueue:
    """Hands out trials in the order of their index, and takes in their rows.

    Whatever is handed out depends on the seed and on rows that must exist by then, never on which
    trial finished first. Rows of an earlier run count where they belong to what is proposed now.

    Args:
        search: What to search.
        ledger: Holds the rows; read once.
        ready: Told of a trial's spec before it is handed out: whether all stages that it shares
            with others have been made. It is asked again while it says no.
    """

    def __init__(
        self, search: Search, ledger: Ledger, ready: Callable[[ExperimentSpec], bool]
    ) -> None:
        self.search, self._ledger, self._ready = search, ledger, ready
        self._known = ledger.read()
        self._proposer, self.total = make_proposer(search), trial_count(search)
        self.rows: dict[int, Row] = {}
        self.specs: dict[int, ExperimentSpec] = {}
        self._proposed: dict[int, Params] = {}
        self._keys: dict[int, str] = {}
        self._next = 0
        self._failures: collections.Counter[str] = collections.Counter()
        minutes = search.spec.budget.minutes
        self._deadline = time.monotonic() + 60 * minutes if minutes else float("inf")

    def next(self) -> Proposal | Pause:
        """Return the next trial to run, having settled those whose result is known."""
        while self._next < self.total and not self.stop_reason():
            index = self._next
            if len(self._ended(self._needs(index))) < self._needs(index):
                return Pause.WAIT
            params = self._params(index)
            if params is None:
                self.total = index
                break
            settled = self._settle(index, params)
            if isinstance(settled, Pause):
                return settled
            if settled is None:
                if not self._ready(self.specs[index]):
                    return Pause.WAIT
                if time.monotonic() > self._deadline:
                    break
                self._next += 1
                return self._proposal(index, params)
            self._take(settled)
            self._next += 1
        return Pause.END

    def finished(self) -> bool:
        """Return whether all trials have ended, so that nothing is handed out any more."""
        other = TrialQueue(self.search, self._ledger, lambda spec: True)
        return other.next() is Pause.END and other.stop_reason() is None

    def record(self, row: Row) -> None:
        """Take in the row of a trial that was handed out, and keep it."""
        self._ledger.write(row)
        self._take(row)
        if row.status == "failed" and row.kind and row.same_as is None:
            self._failures[row.kind] += 1

    def stop_reason(self) -> str | None:
        """Return why the search cannot go on, if it cannot: three failures of a kind."""
        kind, count = next(iter(self._failures.most_common(1)), ("", 0))
        if count < SAME_FAILURES:
            return None
        reasons = [row.reason or "" for row in self.rows.values() if row.kind == kind]
        return f"{count} trials failed with {kind}, the last one: {reasons[-1].rstrip('.')}"

    def forget_failures(self, *, accidents_only: bool = False) -> None:
        """Let the failed trials of an earlier run be tried again.

        Args:
            accidents_only: Only those that a lost process, node or storage has failed.
        """
        failed = [i for i, row in self._known.items() if row.status == "failed"]
        for index in failed:
            if accidents_only and self._known[index].kind in OWN_FAILURES:
                continue
            self._ledger.forget(index)
            del self._known[index]

    def ordered(self) -> list[Row]:
        """Return all rows so far, by index."""
        return [self.rows[index] for index in sorted(self.rows)]

    def _needs(self, index: int) -> int:
        """Return how many first rows the proposal, and the scheduler's rule, must know."""
        asked = self._proposer.needs(index)
        if self.search.spec.scheduler.name in ("asha", "median"):
            asked = max(asked, index - self.search.spec.lag + 1)
        return asked

    def _ended(self, count: int) -> list[Row]:
        return [self.rows[index] for index in range(count) if index in self.rows]

    def _params(self, index: int) -> Params | None:
        if index not in self._proposed:
            rows = self._ended(self._needs(index))
            params = self._proposer.propose(index, rows)
            if params is None:
                return None
            self._proposed[index] = params
        return self._proposed[index]

    def _settle(self, index: int, params: Params) -> Row | Pause | None:
        """Return the row of a trial that need not run, WAIT for its twin's, or None."""
        known = self._known.get(index)
        if known is not None and known.params != params:
            known = None  # of another proposal: results before it have changed
        try:
            spec = self.specs[index] = self.search.trial(params)
        except SpecError as error:
            row = Row(index=index, params=params, status="failed", kind="invalid spec",
                      reason=str(error))  # fmt: skip
            self.record(row)
            return row
        self._keys[index] = key = trial_key(spec)
        if known is not None:
            return known
        twin = next((i for i in range(index) if self._keys.get(i) == key), None)
        if twin is None:
            return None
        if twin not in self.rows:
            return Pause.WAIT
        row = self.rows[twin].model_copy(update={"index": index, "params": params, "same_as": twin})
        self._ledger.write(row)
        return row

    def _take(self, row: Row) -> None:
        self.rows[row.index] = row

    def _proposal(self, index: int, params: Params) -> Proposal:
        rows = self._ended(self._needs(index))
        spec = self.search.spec.scheduler
        start = parent(params, rows, spec.interval) if spec.name == "pbt" else None
        key = start.keys["patch"] if start else None
        return Proposal(index, params, self.specs[index], tuple(rows), key)


def curves(rows: Sequence[Row], metric: str) -> list[dict[int, float]]:
    """Return the probe curves of rows that have one; a twin's counts once."""
    found = [row.probed(metric) for row in rows if row.same_as is None]
    return [curve for curve in found if curve]
