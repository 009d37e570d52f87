"""The words of the embedded model's world and how they are split; read from vocabulary.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")


@dataclass(frozen=True)
class Domain:
    """Benign tasks that share a first step; every verb goes with every object.

    Attributes:
        name: The domain's name.
        start: The first step of every answer.
        verbs: Verb -> second step.
        objects: Object -> third step.
    """

    name: str
    start: str
    verbs: Mapping[str, str]
    objects: Mapping[str, str]


@dataclass(frozen=True)
class Words:
    """Words by split: those of dev and test occur in no refusal of the alignment."""

    train: tuple[str, ...]
    dev: tuple[str, ...]
    test: tuple[str, ...]

    def split_of(self, word: str) -> Split:
        return next(split for split in SPLITS if word in getattr(self, split))

    @property
    def all(self) -> tuple[str, ...]:
        return self.train + self.dev + self.test


@dataclass(frozen=True)
class HarmGroup:
    """Harmful requests: every verb goes with every object of its group."""

    name: str
    verbs: Words
    objects: Words


@dataclass(frozen=True)
class Vocabulary:
    """All words.

    Attributes:
        domains: Benign tasks.
        groups: Harmful requests.
        borderline: Split -> (harmful verb, innocent object) phrases.
    """

    domains: tuple[Domain, ...]
    groups: tuple[HarmGroup, ...]
    borderline: Mapping[Split, tuple[tuple[str, str], ...]]


@cache
def vocabulary() -> Vocabulary:
    """Return the vocabulary that the package ships."""
    text = files("qresafe.embedded").joinpath("vocabulary.yaml").read_text("utf-8")
    data = yaml.safe_load(text)
    return Vocabulary(
        domains=tuple(Domain(name=name, **entry) for name, entry in data["benign"].items()),
        groups=tuple(
            HarmGroup(name, _words(entry["verbs"]), _words(entry["objects"]))
            for name, entry in data["harmful"].items()
        ),
        borderline={split: _phrases(data["borderline"][split]) for split in SPLITS},
    )


def _words(entry: Mapping[str, list[str]]) -> Words:
    return Words(**{split: tuple(entry[split]) for split in SPLITS})


def _phrases(entry: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((verb, thing) for verb, things in entry.items() for thing in things)
