"""What a search may vary: domains of dotted spec keys, drawn by seed, checked against the spec."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from qresafe.errors import SpecError, nearest
from qresafe.loading import nested, value_types
from qresafe.spec_base import Positive, Spec
from qresafe.specs import ExperimentSpec
from qresafe.variants import with_changes

if TYPE_CHECKING:
    from numpy.random import Generator

Params = dict[str, Any]  # dotted key -> value


class Domain(Spec):
    """Where the values of one key come from: exactly one of uniform, loguniform and choice."""

    MAY_BE_EMPTY: ClassVar[frozenset[str]] = frozenset({"choice"})
    uniform: tuple[float, float] | None = None  # low and high, both included
    loguniform: tuple[float, float] | None = None
    choice: tuple[Any, ...] | None = None  # any values, mappings and preset names included
    step: Positive | None = None  # with uniform: low, low + step, ...
    # Only where each of these keys of the space has one of the values.
    when: dict[str, tuple[Any, ...]] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _single_values(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("when"), dict):
            lists = {k: v if isinstance(v, list) else [v] for k, v in data["when"].items()}
            return data | {"when": lists}
        return data

    @model_validator(mode="after")
    def _whole(self) -> Domain:
        given = [n for n in ("uniform", "loguniform", "choice") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of uniform, loguniform and choice")
        low, high = self.uniform or self.loguniform or (0.0, 1.0)
        if low >= high:
            raise ValueError(f"the range [{low:g}, {high:g}] is empty: low must be below high")
        if self.choice is not None and not self.choice:
            raise ValueError("the choice is empty: give at least one value")
        if self.loguniform and low <= 0:
            raise ValueError(f"loguniform needs a low above 0, not {low:g}")
        if self.step and not self.uniform:
            raise ValueError("step goes with uniform only")
        return self


@dataclass(frozen=True)
class Parameter:
    """One key of a space.

    Attributes:
        key: The dotted key, such as "patch.mask.tau".
        domain: Its values.
        integer: Whether the key takes whole numbers only; ranges are then rounded.
    """

    key: str
    domain: Domain
    integer: bool

    def value(self, share: float) -> Any:
        """Return the value at `share` of the domain, a number in [0, 1)."""
        domain = self.domain
        if domain.choice is not None:
            return domain.choice[min(int(share * len(domain.choice)), len(domain.choice) - 1)]
        if domain.step:
            points = self.points()
            return points[min(int(share * len(points)), len(points) - 1)]
        low, high = self.bounds
        if domain.loguniform:
            return self._number(math.exp(math.log(low) + share * (math.log(high) - math.log(low))))
        return self._number(low + share * (high - low))

    @property
    def bounds(self) -> tuple[float, float]:
        """The ends of a range; (0, number of choices - 1) of a choice."""
        if self.domain.choice is not None:
            return 0.0, float(len(self.domain.choice) - 1)
        low, high = self.domain.uniform or self.domain.loguniform or (0.0, 1.0)
        return low, high

    def position(self, value: Any) -> float:
        """Return where `value` lies between the domain's ends, cut to [0, 1]."""
        low, high = self.bounds
        if self.domain.choice is not None:
            at = self.domain.choice.index(value) if value in self.domain.choice else 0
            return at / high if high else 0.5
        if self.domain.loguniform:
            low, high, value = math.log(low), math.log(high), math.log(max(value, 1e-300))
        return float(min(1.0, max(0.0, (value - low) / (high - low))))

    def contains(self, value: Any) -> bool:
        """Return whether the domain has this value."""
        if self.domain.choice is not None:
            return value in self.domain.choice
        if self.domain.step:
            return value in self.points()
        low, high = self.bounds
        return isinstance(value, int | float) and low <= value <= high

    def points(self) -> list[Any]:
        """Return all values of a domain that has finitely many.

        Raises:
            SpecError: It is a range without steps.
        """
        if self.domain.choice is not None:
            return list(self.domain.choice)
        if not self.domain.step:
            remedy = "give it a choice or a step, or use searcher random or optuna"
            raise SpecError(f"{self.key} has no end of values for a grid", remedy=remedy)
        low, high = self.bounds
        count = math.floor((high - low) / self.domain.step + 1e-9) + 1
        return [self._number(round(low + i * self.domain.step, 12)) for i in range(count)]

    def ends(self) -> list[Any]:
        """Return the values to check against the spec: all choices, or both ends of a range."""
        if self.domain.choice is not None:
            return list(self.domain.choice)
        return [self._number(bound) for bound in self.bounds]

    def active(self, params: Mapping[str, Any]) -> bool:
        """Return whether the key takes part, given the values drawn before it."""
        return all(params.get(key) in values for key, values in self.domain.when.items())

    def _number(self, value: float) -> float | int:
        return round(value) if self.integer else float(value)


@dataclass(frozen=True)
class Space:
    """The parameters of a search, each after those that its condition names."""

    parameters: tuple[Parameter, ...]

    @classmethod
    def of(cls, domains: Mapping[str, Domain]) -> Space:
        """Order domains and find out which keys take whole numbers.

        Raises:
            SpecError: There is no key, a condition names a key that is not there or its own, or
                one key is part of another.
        """
        if not domains:
            raise SpecError("the space has no key", remedy="add one, e.g. patch.mask.tau")
        for key, other in itertools.permutations(domains, 2):
            if other.startswith(f"{key}."):
                raise SpecError(f"{key} holds {other}", where="space", remedy="keep one of them")
        ordered = [Parameter(key, domains[key], _is_integer(key)) for key in _ordered(domains)]
        return cls(tuple(ordered))

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self.parameters)

    def draw(self, rng: Generator) -> Params:
        """Return independent draws; equally many random numbers whatever the conditions say."""
        params: Params = {}
        for parameter, share in zip(self, rng.random(len(self.parameters)), strict=True):
            if parameter.active(params):
                params[parameter.key] = parameter.value(float(share))
        return params

    def grid(self) -> list[Params]:
        """Return every combination once, the last key varying fastest.

        Raises:
            SpecError: A parameter has no finite list of values.
        """
        found: list[Params] = [{}]
        for parameter in self:
            points = parameter.points()
            found = [
                params | added
                for params in found
                for added in (
                    [{parameter.key: point} for point in points]
                    if parameter.active(params)
                    else [{}]
                )
            ]
        return found

    def check(self, base: ExperimentSpec) -> None:
        """Refuse a space some of whose values the experiment cannot have.

        A value counts if it fits the base, or the base with all other keys at one of their ends.

        Raises:
            SpecError: A key is unknown (its nearest neighbours are named), or a value is refused.
        """
        others: list[Params] = [{}, *({p.key: p.ends()[end] for p in self} for end in (0, -1))]
        for parameter in self:
            needed = {key: values[0] for key, values in parameter.domain.when.items()}
            for value in parameter.ends():
                own = needed | {parameter.key: value}
                refusals = [_refusal(base, other | own) for other in others]
                if all(refusals) and refusals[0]:
                    raise refusals[0]


def with_params(base: ExperimentSpec, params: Mapping[str, Any]) -> ExperimentSpec:
    """Return the experiment with some keys set.

    Raises:
        SpecError: A key is unknown or a value is not accepted.
    """
    if not params:
        return base
    return with_changes(base, nested(params))


def _refusal(base: ExperimentSpec, params: Mapping[str, Any]) -> SpecError | None:
    try:
        with_params(base, params)
    except SpecError as error:
        return error
    return None


def value_at(spec: ExperimentSpec, key: str) -> Any:
    """Return the value of a dotted key in an experiment, as plain data; None if it is not there."""
    node: Any = spec.model_dump(mode="json")
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _is_integer(key: str) -> bool:
    types = value_types(ExperimentSpec, key)
    return int in types and float not in types


def _ordered(domains: Mapping[str, Domain]) -> Sequence[str]:
    placed: list[str] = []
    for key, domain in domains.items():
        for parent in domain.when:
            if parent not in domains:
                remedy = nearest(parent, domains)
                raise SpecError(f"{key} depends on {parent!r}", where="space", remedy=remedy)
    while len(placed) < len(domains):
        free = [k for k in domains if k not in placed and set(domains[k].when) <= set(placed)]
        if not free:
            left = ", ".join(key for key in domains if key not in placed)
            raise SpecError(f"conditions in a circle: {left}", where="space", remedy="break it")
        placed += free
    return placed
