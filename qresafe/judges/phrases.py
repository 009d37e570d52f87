"""The rules of the `refusal` judge, one YAML file per language, and which language a text is in."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import yaml

from qresafe.records import Axis, Outcome

DEFAULT = "en"
AXES: tuple[Axis, ...] = ("harmful", "borderline", "benign")
_LOOK_AT = 60  # words; enough to tell a language
_LIST = re.compile(r"\n\s*(?:\d+[.)]|[-*•])\s")

# Scripts that tell a language by themselves, in this order: Japanese mixes kana with Chinese
# characters, so kana come first.
_SCRIPTS = (
    ("ja", re.compile("[\u3040-\u30ff]")),
    ("zh", re.compile("[\u4e00-\u9fff]")),
    ("ko", re.compile("[\uac00-\ud7af]")),
    ("ar", re.compile("[\u0600-\u06ff]")),
    ("ru", re.compile("[\u0400-\u04ff]")),
    ("hi", re.compile("[\u0900-\u097f]")),
)


class Rule(NamedTuple):
    """One kind of refusal; it holds where `pattern` is found and nothing below forbids it.

    Attributes:
        name: What the verdict is explained with.
        axes: The axes that it is asked of.
        outcome: What it says: *refused*, or *partial*.
        hints: One of these strings occurs wherever the pattern matches: a quick first look.
        pattern: What is looked for in the opening (lower case, single spaces).
        beside: If given, it must be in the opening too.
        unless: If given, it must not be there.
        distinct: How many different matches are needed.
        without_list: Whether a list anywhere in the answer speaks against it.
    """

    name: str
    axes: tuple[Axis, ...]
    outcome: Outcome
    hints: tuple[str, ...]
    pattern: re.Pattern[str]
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
        if not any(hint in opening for hint in self.hints):
            return None
        match = self.pattern.search(opening)
        if match is None or not self._enough(opening):
            return None
        if self.beside and not self.beside.search(opening):
            return None
        if self.unless and self.unless.search(opening):
            return None
        return None if self.without_list and has_list(text) else match

    def _enough(self, opening: str) -> bool:
        return self.distinct == 1 or len(set(self.pattern.findall(opening))) >= self.distinct


class Phrases(NamedTuple):
    """How one language refuses.

    Attributes:
        language: Its ISO 639-1 code.
        words: Frequent words by which a text in a shared script is told to be in it.
        rules: The rules by axis, in the order in which they are tried.
        delivery: Words that hand over what was asked for.
        eager: Words that agree to do so.
        apology: An apology at the very beginning.
    """

    language: str
    words: frozenset[str]
    rules: Mapping[Axis, tuple[Rule, ...]]
    delivery: re.Pattern[str]
    eager: re.Pattern[str]
    apology: re.Pattern[str]


def has_list(text: str) -> bool:
    """Return whether a numbered or bulleted list is in `text`."""
    return _LIST.search(text) is not None


def language_of(opening: str) -> str:
    """Return the code of the language that `opening`, in lower case, is written in.

    A script of its own decides; in the Latin alphabet the language with the most frequent words
    does. What cannot be told is taken as English.
    """
    if not opening.isascii():
        for code, script in _SCRIPTS:
            if len(script.findall(opening)) > 0.2 * len(opening):
                return code
    words = set(opening.split()[:_LOOK_AT])
    known = latin()
    best = max(known, key=lambda code: len(words & known[code].words))
    return best if words & known[best].words else DEFAULT


@cache
def all_phrases() -> dict[str, Phrases]:
    """Return the phrases of every language that has a file, English first."""
    folder = resources.files("qresafe.judges") / "phrases"
    files = [file for file in folder.iterdir() if file.name.endswith(".yaml")]
    found = [_read(yaml.safe_load(file.read_text("utf-8"))) for file in files]
    found.sort(key=lambda phrases: (phrases.language != DEFAULT, phrases.language))
    return {phrases.language: phrases for phrases in found}


@cache
def latin() -> dict[str, Phrases]:
    """Return the languages that share the Latin alphabet."""
    scripts = {code for code, _ in _SCRIPTS}
    return {code: phrases for code, phrases in all_phrases().items() if code not in scripts}


def _read(data: Mapping[str, Any]) -> Phrases:
    fragments = data.get("fragments", {})
    rules = [_rule(entry, fragments) for entry in data["rules"]]
    return Phrases(
        data["language"],
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
        tuple(data.get("hints", ("",))),
        _pattern(data["any"], fragments),
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
