"""The rules of the `refusal` judge, one YAML file per language, and which language a text is in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import yaml

from qresafe.records import Axis, Outcome

DEFAULT = "en"
AXES: tuple[Axis, ...] = ("harmful", "borderline", "benign")
_LOOK_AT = 40  # words; enough to tell a language
_SURE = 3  # so many frequent words of the default language, and no other is tried
_LIST = re.compile(r"\n\s*(?:\d+[.)]|[-*•])\s")


class Rule(NamedTuple):
    """One kind of refusal; it holds where `pattern` is found and nothing below forbids it.

    Attributes:
        name: What the verdict is explained with.
        axes: The axes that it is asked of.
        outcome: What it says: *refused*, or *partial*.
        hints: One of these strings occurs wherever the pattern matches: a quick first look.
        pattern: What is looked for in the opening (lower case, single spaces).
        at_start: Whether the opening must begin with it.
        beside: If given, it must be in the opening too.
        unless: If given, it must not be there.
        distinct: How many of the hints must occur.
        without_list: Whether a list anywhere in the answer speaks against it.
    """

    name: str
    axes: tuple[Axis, ...]
    outcome: Outcome
    hints: tuple[str, ...]
    pattern: re.Pattern[str]
    at_start: bool
    beside: re.Pattern[str] | None
    unless: re.Pattern[str] | None
    distinct: int
    without_list: bool

    def found(self, opening: str, text: str) -> re.Match[str] | None:
        """Return the decisive match, or None.

        Args:
            opening: The start of the answer, in lower case.
            text: The whole answer.
        """
        if not self._hinted(opening):
            return None
        match = self.pattern.match(opening) if self.at_start else self.pattern.search(opening)
        if match is None or (self.beside and not self.beside.search(opening)):
            return None
        if self.unless and self.unless.search(opening):
            return None
        return None if self.without_list and has_list(text) else match

    def _hinted(self, opening: str) -> bool:
        if self.distinct > 1:
            return sum(hint in opening for hint in self.hints) >= self.distinct
        for hint in self.hints:
            if hint in opening:
                return True
        return not self.hints


class Phrases(NamedTuple):
    """How one language refuses.

    Attributes:
        language: Its ISO 639-1 code.
        script: Characters that tell it; None for the Latin alphabet, which many languages share.
        words: Frequent words by which a text in the Latin alphabet is told to be in it.
        rules: The rules by axis, in the order in which they are tried.
        delivery: Words that hand over what was asked for.
        eager: Words that agree to do so.
        apology: An apology at the very beginning.
    """

    language: str
    script: re.Pattern[str] | None
    words: frozenset[str]
    rules: Mapping[str, tuple[Rule, ...]]
    delivery: re.Pattern[str]
    eager: re.Pattern[str]
    apology: re.Pattern[str]

    def rules_for(self, axis: str) -> tuple[Rule, ...]:
        """Return the rules of an axis; of an unknown one, those that hold for every axis."""
        return self.rules.get(axis, self.rules["benign"])


def has_list(text: str) -> bool:
    """Return whether a numbered or bulleted list is in `text`."""
    return _LIST.search(text) is not None


def phrases_for(opening: str, words: Sequence[str]) -> Phrases:
    """Return the phrases of the language that an answer is written in.

    Args:
        opening: Its start, in lower case.
        words: The words of `opening`.

    Returns:
        Those of the script, where a language has one of its own; in the Latin alphabet those of
        the language with the most frequent words. What cannot be told is taken as English.
    """
    if not opening.isascii():
        for script, phrases in _by_script():
            if len(script.findall(opening)) > 0.2 * len(opening):
                return phrases
    first = words[:_LOOK_AT]
    english = _by_words()[0]
    if len(english.words.intersection(first)) >= _SURE:
        return english
    return max(_by_words(), key=lambda phrases: len(phrases.words.intersection(first)))


@cache
def all_phrases() -> list[Phrases]:
    """Return the phrases of every language that has a file, English first."""
    folder = resources.files("qresafe.judges") / "phrases"
    files = [file for file in folder.iterdir() if file.name.endswith(".yaml")]
    found = [_read(yaml.safe_load(file.read_text("utf-8"))) for file in files]
    return sorted(found, key=lambda phrases: (phrases.language != DEFAULT, phrases.language))


@cache
def _by_script() -> list[tuple[re.Pattern[str], Phrases]]:
    # In alphabetical order: Japanese, which mixes kana with Chinese characters, before Chinese.
    return [(phrases.script, phrases) for phrases in all_phrases() if phrases.script]


@cache
def _by_words() -> list[Phrases]:
    return [phrases for phrases in all_phrases() if not phrases.script]


def _read(data: Mapping[str, Any]) -> Phrases:
    fragments = data.get("fragments", {})
    rules = [_rule(entry, fragments) for entry in data["rules"]]
    return Phrases(
        data["language"],
        re.compile(data["script"]) if "script" in data else None,
        frozenset(data.get("words", ())),
        {axis: tuple(rule for rule in rules if axis in rule.axes) for axis in AXES},
        _pattern([data["delivery"]], fragments),
        _pattern([data["eager"]], fragments),
        _pattern([data["apology"]], fragments),
    )


def _rule(data: Mapping[str, Any], fragments: Mapping[str, str]) -> Rule:
    return Rule(
        data["name"],
        tuple(data.get("axes", AXES)),
        data.get("outcome", "refused"),
        tuple(data.get("hints", ())),
        _pattern(data["any"], fragments),
        data.get("at_start", False),
        _pattern(data["beside"], fragments) if "beside" in data else None,
        _pattern(data["unless"], fragments) if "unless" in data else None,
        data.get("distinct", 1),
        data.get("without_list", False),
    )


def _pattern(alternatives: Iterable[str], fragments: Mapping[str, str]) -> re.Pattern[str]:
    """Compile alternatives; "{name}" stands for a fragment, and quantifiers stay as they are."""
    text = "|".join(alternatives)
    for name, fragment in fragments.items():
        text = text.replace(f"{{{name}}}", fragment)
    return re.compile(text)
