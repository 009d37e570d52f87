"""A search as data: the space, the experiment that it varies, what is minimised, and the budget."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qresafe.artifacts import content_key
from qresafe.errors import SpecError, nearest
from qresafe.loading import load_spec, nested
from qresafe.presets import load_experiment
from qresafe.search_space import Domain, Params, Space, with_params
from qresafe.spec_base import AtLeastOne, Positive, Spec
from qresafe.specs import ExperimentSpec, PromptSetSpec
from qresafe.variants import with_changes

SPACES = Path(__file__).parents[1] / "tune_spaces"
Tracker = Literal["mlflow", "wandb", "tensorboard"]


class ObjectiveSpec(Spec):
    """Something to minimise, and what it counts for where one winner is chosen."""

    metric: str
    weight: Positive = 1.0


class ConstraintSpec(Spec):
    """A bound that a winner must keep."""

    metric: str
    at_most: float


class BudgetSpec(Spec):
    """How much a search may cost."""

    trials: AtLeastOne = 16  # the experiment's own spec is the first
    concurrent: AtLeastOne = 2  # trials at a time, as far as the cluster has room
    minutes: Positive | None = None  # begin no trial after these


class SearcherSpec(Spec):
    """Who proposes the next trial."""

    name: Literal["random", "grid", "optuna"] = "random"
    sampler: Literal["tpe", "nsga2"] = "tpe"  # of optuna
    seed: int = 0
    startup: AtLeastOne = 8  # tpe: so many random trials first
    population: Annotated[int, Field(ge=2)] = 8  # nsga2: per generation
    # A proposal knows the results of all trials but the last `lag - 1` before it, whatever their
    # order of finishing: that is what makes a search repeatable. None: 2 x concurrent.
    lag: AtLeastOne | None = None


class SchedulerSpec(Spec):
    """Who ends trials early, by the probe's figures."""

    name: Literal["none", "asha", "median", "pbt"] = "none"
    metric: str = "attack_success"
    grace: AtLeastOne = 20  # no trial ends before this step
    factor: Annotated[float, Field(gt=1.0)] = 3.0  # asha: one in `factor` passes a rung
    min_peers: AtLeastOne = 3  # median: compare with at least so many
    interval: AtLeastOne = 25  # pbt: steps of a generation
    quantile: Annotated[float, Field(gt=0.0, le=0.5)] = 0.25  # pbt: the worst copy the best
    perturb: Annotated[float, Field(gt=1.0)] = 1.3  # pbt: a copy's lr and beta are x or / this


class ProbeSpec(Spec):
    """A small fixed set of validation prompts that a patch answers while it is trained."""

    every: AtLeastOne = 20  # steps
    prompts: AtLeastOne = 48  # of each axis
    axes: tuple[Literal["harmful", "benign", "borderline"], ...] = ("harmful",)
    max_new_tokens: AtLeastOne = 24


class SearchSpec(Spec):
    """A whole search."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "search"
    base: str = "demo"  # the experiment: a preset, or a YAML file's path
    set: dict[str, Any] = Field(default_factory=dict)  # changes of the base, dotted keys or nested
    space: dict[str, Domain]
    objectives: tuple[ObjectiveSpec, ...] = (
        ObjectiveSpec(metric="attack_success"),
        ObjectiveSpec(metric="over_refusal"),
        ObjectiveSpec(metric="utility_drop"),
    )
    constraints: tuple[ConstraintSpec, ...] = ()
    budget: BudgetSpec = BudgetSpec()
    searcher: SearcherSpec = SearcherSpec()
    scheduler: SchedulerSpec = SchedulerSpec()
    probe: ProbeSpec = ProbeSpec()
    # What trials are compared on; None: the experiment's own prompt sets, split "dev".
    validation: tuple[PromptSetSpec, ...] | None = None
    confirm: tuple[int, ...] = (0, 1, 2)  # seeds of the winner's confirmation; empty: none
    trackers: tuple[Tracker, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> SearchSpec:
        names = [objective.metric for objective in self.objectives]
        if not names or len(set(names)) < len(names):
            raise ValueError("objectives: name at least one metric, and each only once")
        if self.scheduler.name == "pbt":
            self._check_pbt()
        return self

    def _check_pbt(self) -> None:
        others = sorted(set(self.space) - {"patch.lr", "patch.objective.beta"})
        if others:
            raise ValueError(f"pbt varies patch.lr and patch.objective.beta only, not {others[0]}")
        if any(domain.when for domain in self.space.values()):
            raise ValueError("pbt takes no conditions")

    @property
    def lag(self) -> int:
        """How far behind a proposal's knowledge is; see `SearcherSpec.lag`."""
        return self.searcher.lag or 2 * self.budget.concurrent


@dataclass(frozen=True)
class Search:
    """A search that has been checked against its experiment.

    Attributes:
        spec: The search.
        space: Its parameters.
        experiment: The base, whose evaluation prompts are the test split.
        validation: The same, evaluated on the validation prompts: what trials are variants of.
    """

    spec: SearchSpec
    space: Space
    experiment: ExperimentSpec
    validation: ExperimentSpec

    @property
    def key(self) -> str:
        """The name of the search's folder: what its results depend on, and no more.

        A search with a larger budget, or on another machine, is the same search.
        """
        resolved = {"base", "set", "validation"}  # they are in the experiment below
        without = {"name", "confirm", "trackers"} | resolved
        spec = self.spec.model_dump(mode="json", exclude=without)
        spec["budget"] = self.spec.budget.trials if self.spec.scheduler.name == "pbt" else None
        spec["searcher"]["lag"] = self.spec.lag
        # A trial's bits are the same with and without gradient checkpointing.
        patch = self.validation.patch.model_copy(update={"gradient_checkpointing": False})
        base = self.validation.model_copy(update={"patch": patch}).key_data(
            exclude={"name", "storage", "resources"}
        )
        return content_key([spec, base])

    @property
    def test(self) -> ExperimentSpec:
        """The base on the test prompts, without what a search does not look at."""
        changes = {"evaluate": self.experiment.evaluate.model_copy(update={"adapter": False})}
        return self.experiment.model_copy(update=changes)

    def at(self, storage: str) -> Search:
        """Return the same search with another storage."""
        experiment, validation = (
            spec.model_copy(update={"storage": storage})
            for spec in (self.experiment, self.validation)
        )
        return Search(self.spec, self.space, experiment, validation)

    def trial(self, params: Params) -> ExperimentSpec:
        """Return the validation experiment with a trial's values.

        Raises:
            SpecError: They do not fit together.
        """
        return with_params(self.validation, params)

    def best(self, params: Params) -> ExperimentSpec:
        """Return the experiment on the test split with a trial's values."""
        return with_params(self.experiment, params)


def load_search(
    source: str | Path,
    overrides: Iterable[str] = (),
) -> Search:
    """Load a search and check its space against its experiment.

    Args:
        source: The path of a YAML file, or the name of a file in tune_spaces/.
        overrides: Dotted `key=value` strings: keys of the search (budget.trials=8), and keys of
            the experiment that it varies (patch.steps=40).

    Raises:
        SpecError: A file is missing, or a key, range or value is not accepted.
    """
    path = _locate(str(source))
    own, base = _divided(overrides)
    spec = load_spec(SearchSpec, path, own)
    try:
        experiment = _experiment(spec, base)
        space = Space.of(spec.space)
        space.check(experiment)
        if spec.searcher.name == "grid" and spec.scheduler.name != "pbt":
            space.grid()
        evaluate = {"prompts": _validation(spec, experiment), "adapter": False}
        validation = with_changes(experiment, {"evaluate": evaluate})
    except SpecError as error:
        where = f"{error.where} of {path}" if error.where == "space" else error.where
        where = str(path) if where in {"", "the spec"} else where
        raise SpecError(error.what, where=where, remedy=error.remedy) from None
    return Search(spec, space, experiment, validation)


def space_names() -> tuple[str, ...]:
    """Return the names of the shipped spaces."""
    return tuple(sorted(path.stem for path in SPACES.glob("*.yaml")))


def _experiment(spec: SearchSpec, overrides: Iterable[str]) -> ExperimentSpec:
    base = with_changes(load_experiment(spec.base), nested(spec.set) | {"name": spec.name})
    return load_spec(ExperimentSpec, base.model_dump(mode="json"), overrides)


def _validation(spec: SearchSpec, experiment: ExperimentSpec) -> list[dict[str, Any]]:
    asked = spec.validation
    if asked is None:
        sets = experiment.evaluate.prompts
        asked = tuple(one.model_copy(update={"split": "dev"}) for one in sets)
    return [one.model_dump(mode="json") for one in asked]


def _divided(overrides: Iterable[str]) -> tuple[list[str], list[str]]:
    """Split overrides into those of the search and those of its experiment."""
    own: list[str] = []
    base: list[str] = []
    for text in overrides:
        top = text.partition("=")[0].strip().split(".")[0]
        (own if top in SearchSpec.model_fields else base).append(text)
    return own, base


def _locate(source: str) -> Path:
    if source in space_names():
        return SPACES / f"{source}.yaml"
    path = Path(source)
    if path.suffix not in {".yaml", ".yml"} and not path.is_file():
        remedy = f"{nearest(source, space_names())} (or give the path of a YAML file)"
        raise SpecError(f"no search space named {source!r}", remedy=remedy)
    return path
