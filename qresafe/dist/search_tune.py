"""The search's queue in Ray Tune's words: a searcher, a scheduler and a callback."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from qresafe.dist.search_trial import OUTCOME
from qresafe.progress import Progress
from qresafe.stages.measures import BY_NAME
from qresafe.stages.search.ledger import Row
from qresafe.stages.search.queue import Pause, Proposal, TrialQueue, curves
from qresafe.stages.search.rules import stops


@dataclass
class Live:
    """What is known of the trials that are running.

    Attributes:
        proposals: Index -> what was handed out.
        looks: Index -> step -> the probe's figures.
        reasons: Index -> why the rule ended it.
    """

    queue: TrialQueue
    proposals: dict[int, Proposal] = field(default_factory=dict)
    looks: dict[int, dict[int, dict[str, Any]]] = field(default_factory=lambda: defaultdict(dict))
    reasons: dict[int, str] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles what it is given for its snapshots, which are not used."""
        return {}

    def look(self, result: dict[str, Any], index: int) -> None:
        """Note a probe; after a restart, the same one again."""
        shares = {name: result[name] for name in BY_NAME if name in result}
        self.looks[index][int(result["step"])] = {"step": result["step"], **shares}

    def curve(self, index: int) -> list[dict[str, Any]]:
        """Return the probes of a trial by step."""
        return [look for _, look in sorted(self.looks[index].items())]


class QueueSearcher(Searcher):  # type: ignore[misc]
    """Hands the queue's proposals to Tune."""

    def __init__(self, live: Live) -> None:
        super().__init__()
        self._live = live

    def suggest(self, trial_id: str) -> Any:
        found = self._live.queue.next()
        if found is Pause.END:
            return Searcher.FINISHED
        if not isinstance(found, Proposal):
            return None
        self._live.proposals[found.index] = found
        return {"trial": found.index, "params": found.params, "start": found.start}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """The callback keeps the results: it also sees why a trial failed."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a search is continued from its rows (`stages.search.ledger`)."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


class RuleScheduler(FIFOScheduler):  # type: ignore[misc]
    """Ends a trial when the search's rule says so."""

    def __init__(self, live: Live) -> None:
        super().__init__()
        self._live = live

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        live, index = self._live, trial.config["trial"]
        spec = live.queue.search.spec.scheduler
        if OUTCOME in result:
            return str(TrialScheduler.CONTINUE)
        live.look(result, index)
        metric = spec.metric
        curve = {step: look[metric] for step, look in live.looks[index].items() if metric in look}
        peers = curves(live.proposals[index].peers, metric)
        reason = stops(spec, curve, peers) if curve else None
        if reason is None:
            return str(TrialScheduler.CONTINUE)
        live.reasons[index] = reason
        return str(TrialScheduler.STOP)


class Recorder(Callback):  # type: ignore[misc]
    """Turns whatever ends a trial into its row, and shows how far the search is."""

    def __init__(self, live: Live, progress: Progress) -> None:
        self._live, self._progress = live, progress

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        if OUTCOME in result:
            self._record(Row.model_validate_json(result[OUTCOME]))

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        index = trial.config["trial"]
        if index in self._live.reasons and index not in self._live.queue.rows:
            self._record(self._stopped(index, trial))

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        kind, reason = lost(trial)
        own = {"index": trial.config["trial"], "params": trial.config["params"]}
        self._record(Row(**own, status="failed", kind=kind, reason=reason))

    def _stopped(self, index: int, trial: Trial) -> Row:
        curve, proposal = self._live.curve(index), self._live.proposals[index]
        last = dict(curve[-1])
        last["steps"] = last.pop("step")
        return Row(
            index=index,
            params=proposal.params,
            status="stopped",
            reason=self._live.reasons[index],
            metrics={name: value for name, value in last.items() if value is not None},
            curve=curve,
            seconds=round(float(trial.last_result.get("time_total_s", 0.0)), 3),
        )

    def _record(self, row: Row) -> None:
        before = len(self._live.queue.rows)
        self._live.queue.record(row)
        said = row.reason or ", ".join(f"{k} {v:.3g}" for k, v in list(row.metrics.items())[:3])
        self._progress.advance(len(self._live.queue.rows) - before, f"{row.status}: {said[:80]}")


def lost(trial: Trial) -> tuple[str, str]:
    """Return the kind of a trial's end that its own process could not tell of, and a line."""
    text = Path(trial.error_file).read_text() if trial.error_file else ""
    if "OutOfMemory" in text or "out of memory" in text.lower():
        return "out of memory", "the trial's process was killed for want of memory"
    if "actor died" in text.lower() or "actor is dead" in text.lower():
        return "killed", "the trial's process or node was lost again and again"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "error", (lines[-1][:300] if lines else "the trial ended without a word")
