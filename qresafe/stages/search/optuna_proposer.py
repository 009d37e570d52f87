"""Optuna's samplers (TPE, NSGA-II), told of results in the trials' order and `lag` behind.

`ray.tune.search.optuna.OptunaSearch` tells them as trials finish, and cannot hand on constraints.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from qresafe.search_space import Parameter, Params, Space
from qresafe.search_spec import Search, SearchSpec
from qresafe.stages.search.ledger import Row
from qresafe.stages.search.selection import objectives

ENOUGH = 10  # trials, below which an importance is noise


class OptunaProposer:
    """Asks and tells an Optuna study in memory."""

    def __init__(self, search: Search) -> None:
        self._search, self._lag = search, search.spec.lag
        self._study = make_study(search.spec)
        self._asked: dict[int, Trial] = {}
        self._told = 0

    def needs(self, index: int) -> int:
        return max(0, index - self._lag + 1)

    def propose(self, index: int, rows: Sequence[Row]) -> Params | None:
        for row in rows[self._told : self.needs(index)]:
            self._tell(row, rows)
        self._told = max(self._told, self.needs(index))
        if index == 0:
            return {}
        trial = self._asked[index] = self._study.ask()
        params: Params = {}
        for parameter in self._search.space:
            if parameter.active(params):
                params[parameter.key] = _suggest(trial, parameter)
        return params

    def _tell(self, row: Row, rows: Sequence[Row]) -> None:
        spec = self._search.spec
        trial = self._asked.pop(row.index, None)
        if trial is None:  # the experiment's own spec, which nobody asked for
            known = finished_trial(self._search, row)
            if known is not None:
                self._study.add_trial(known)
            return
        values = _values(row, rows, spec)
        if values is None:
            self._study.tell(trial, state=TrialState.FAIL)
            return
        for bound in spec.constraints:
            value = row.metrics.get(bound.metric)
            # A stopped trial is not known to keep a bound that its probe did not look at.
            excess = 1.0 if value is None else value - bound.at_most
            trial.set_constraint(bound.metric, excess)
        self._study.tell(trial, values)


def make_study(spec: SearchSpec) -> optuna.Study:
    """Return an empty study with the search's sampler and one direction per objective."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    searcher = spec.searcher
    sampler: optuna.samplers.BaseSampler
    if searcher.sampler == "nsga2":
        sampler = optuna.samplers.NSGAIISampler(
            population_size=searcher.population, seed=searcher.seed
        )
    else:
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=searcher.startup, seed=searcher.seed, constant_liar=True
        )
    return optuna.create_study(directions=["minimize"] * len(spec.objectives), sampler=sampler)


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """Return Optuna's name for each domain; a choice is the place in its list."""
    return {parameter.key: _distribution(parameter) for parameter in space}


def finished_trial(search: Search, row: Row) -> FrozenTrial | None:
    """Return a row as a finished Optuna trial; None if it has no value or leaves the space."""
    from qresafe.stages.search.values import row_values

    values = objectives(row, search.spec)
    given = row_values(search, row)
    inside = {p.key: p for p in search.space if p.key in given}
    if values is None or not all(p.contains(given[key]) for key, p in inside.items()):
        return None
    return create_trial(
        values=values,
        params={key: _encoded(p, given[key]) for key, p in inside.items()},
        distributions={key: _distribution(p) for key, p in inside.items()},
    )


def _values(row: Row, rows: Sequence[Row], spec: SearchSpec) -> list[float] | None:
    """Return what the sampler is told of a row: None of a failed one.

    Of a stopped one, an objective that its probe did not measure counts as the worst that a
    completed trial had: the rule has said that it is no good, not how bad.
    """
    if row.status == "failed":
        return None
    found: list[float] = []
    for objective in spec.objectives:
        value = row.metrics.get(objective.metric)
        if value is None:
            known = [r.metrics.get(objective.metric) for r in rows[: row.index + 1]]
            value = max((v for v in known if v is not None), default=None)
        if value is None:
            return None
        found.append(value)
    return found


def _distribution(parameter: Parameter) -> BaseDistribution:
    domain = parameter.domain
    if domain.choice is not None:
        return CategoricalDistribution(list(range(len(domain.choice))))
    low, high = parameter.bounds
    log = domain.loguniform is not None
    if parameter.integer:
        step = int(domain.step) if domain.step else 1
        return IntDistribution(round(low), round(high), log=log, step=step)
    return FloatDistribution(low, high, log=log, step=domain.step)


def _suggest(trial: Trial, parameter: Parameter) -> Any:
    found = trial._suggest(parameter.key, _distribution(parameter))
    return found if parameter.domain.choice is None else parameter.domain.choice[int(found)]


def _encoded(parameter: Parameter, value: Any) -> Any:
    return value if parameter.domain.choice is None else parameter.domain.choice.index(value)


def importance(search: Search, rows: Sequence[Row], objective: int) -> Mapping[str, float]:
    """Return each key's importance (PED-ANOVA), summing to 1; empty where it cannot be told.

    Args:
        search: The search.
        rows: Its rows; those that are completed count.
        objective: The place of an objective.
    """
    study = make_study(search.spec)
    for row in rows:
        trial = finished_trial(search, row) if row.status == "completed" else None
        if trial is not None and row.same_as is None:
            study.add_trial(trial)
    if len(study.trials) < ENOUGH:
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = optuna.importance.get_param_importances(
                study, evaluator=evaluator, target=lambda trial: float(trial.values[objective])
            )
        except (ValueError, RuntimeError):  # no key that all trials share
            return {}
    alike = any("select the same set of trials" in str(warning.message) for warning in said)
    return {} if alike else found
