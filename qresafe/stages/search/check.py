"""A user's mistakes in a search, found before the first trial."""

from __future__ import annotations

import pyarrow as pa

from qresafe.errors import DataError, SpecError
from qresafe.judge_specs import title_of
from qresafe.search_spec import Search
from qresafe.stages.experiment import Experiment
from qresafe.stages.prompts import evaluation_prompts
from qresafe.stages.runtime import InProcessRuntime
from qresafe.stages.search.metrics import METRICS, METRICS_BY_NAME, check_metrics
from qresafe.stages.search.proposers import trial_count


def check_search(search: Search) -> None:
    """Check metrics, prompts and model of a search.

    Raises:
        UserError: A metric is not produced, validation and test prompts overlap, a name is
            unknown, a file malformed, or the model not usable.
    """
    spec = search.spec
    experiment = Experiment(search.validation, InProcessRuntime())
    names = [o.metric for o in spec.objectives] + [c.metric for c in spec.constraints]
    named = [title_of(judge) for judge in search.validation.evaluate.judges]
    check_metrics(names, experiment.prompts, named)
    _check_rule(search)
    _check_splits(search)
    trial_count(search)
    experiment.check()


def _check_rule(search: Search) -> None:
    """Check that the probe measures what the scheduler looks at."""
    spec = search.spec
    if spec.scheduler.name not in ("asha", "median"):
        return
    experiment = Experiment(search.validation, InProcessRuntime())
    axes = spec.probe.axes
    rows = [row for row in experiment.prompts.to_pylist() if row["axis"] in axes]
    if not rows:
        what = f"the probe asks {', '.join(axes)} prompts, and there are none"
        raise SpecError(what, where="probe.axes", remedy="name axes of the validation prompts")
    asked = pa.Table.from_pylist(rows, experiment.prompts.schema)
    metric = spec.scheduler.metric
    probed = {m.name for m in METRICS if m.measure and m.measure.name == m.name}
    if metric in METRICS_BY_NAME and metric not in probed:
        remedy = f"use one of {', '.join(sorted(probed))}"
        raise SpecError(f"no probe measures {metric}", where="scheduler.metric", remedy=remedy)
    rules = [judge for judge in search.validation.evaluate.judges if isinstance(judge, str)]
    check_metrics([metric], asked, rules)


def _check_splits(search: Search) -> None:
    """Refuse to choose a winner on the prompts that are to judge it."""
    validation = set(evaluation_prompts(search.validation.evaluate.prompts)["prompt"].to_pylist())
    test = set(evaluation_prompts(search.experiment.evaluate.prompts)["prompt"].to_pylist())
    if shared := validation & test:
        what = f"{len(shared)} prompts, {min(shared)!r} first, are both validation and test"
        remedy = "give the search prompt sets of its own under validation"
        raise DataError(what, where="the search", remedy=remedy)
