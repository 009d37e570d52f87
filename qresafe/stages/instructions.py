"""Verifiable instructions, as IFEval has them: whether a completion follows one, by counting."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from qresafe.errors import DataError, nearest

Arguments = Mapping[str, Any]
Check = Callable[[str, Arguments], bool]


def follows(instruction: str, text: str, arguments: Arguments) -> bool:
    """Return whether a completion follows one instruction.

    Args:
        instruction: IFEval's id, such as "length_constraints:number_words".
        text: The completion. An empty one follows nothing.
        arguments: IFEval's kwargs of the instruction; None values are as if absent.

    Raises:
        DataError: The instruction is not among `CHECKS`, or lacks an argument.
    """
    if instruction not in CHECKS:
        raise DataError(f"no check of {instruction!r}", remedy=nearest(instruction, CHECKS))
    given = {name: value for name, value in arguments.items() if value is not None}
    try:
        return bool(text.strip()) and CHECKS[instruction](text, given)
    except KeyError as error:
        raise DataError(f"{instruction} lacks the argument {error.args[0]!r}") from None


def follows_loosely(instruction: str, text: str, arguments: Arguments) -> bool:
    """Return whether it does after a first or last line, or asterisks, are left out.

    The loose reading of IFEval: models introduce and close their answers, and mark them up.
    """
    lines = text.split("\n")
    cut = (lines, lines[1:], lines[:-1], lines[1:-1])
    variants = ["\n".join(some).strip() for some in cut]
    variants += [variant.replace("*", "") for variant in variants]
    return any(follows(instruction, variant, arguments) for variant in variants)


def _compare(count: int, wanted: int, relation: str) -> bool:
    return count < wanted if relation == "less than" else count >= wanted


def _at_least(count: int, wanted: int) -> bool:
    return count >= wanted


def _count(text: str, word: str) -> int:
    return len(re.findall(re.escape(word), text, flags=re.IGNORECASE))


def _words(text: str, given: Arguments) -> bool:
    return _compare(len(re.findall(r"\w+", text)), given["num_words"], given["relation"])


def _paragraphs(text: str, given: Arguments) -> bool:
    parts = re.split(r"\s?\*\*\*\s?", text)
    inner = [part for place, part in enumerate(parts) if part.strip() or 0 < place < len(parts) - 1]
    wanted: int = given["num_paragraphs"]
    return all(part.strip() for part in inner) and len(inner) == wanted


def _keywords(text: str, given: Arguments) -> bool:
    return all(_count(text, word) for word in given["keywords"])


def _frequency(text: str, given: Arguments) -> bool:
    return _compare(_count(text, given["keyword"]), given["frequency"], given["relation"])


def _forbidden(text: str, given: Arguments) -> bool:
    words = "|".join(re.escape(word) for word in given["forbidden_words"])
    return re.search(rf"\b(?:{words})\b", text, flags=re.IGNORECASE) is None


def _letters(text: str, given: Arguments) -> bool:
    count = text.lower().count(given["letter"].lower())
    return _compare(count, given["let_frequency"], given["let_relation"])


def _bullets(text: str, given: Arguments) -> bool:
    stars = re.findall(r"^\s*\*[^*].*$", text, flags=re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, flags=re.MULTILINE)
    wanted: int = given["num_bullets"]
    return len(stars) + len(dashes) == wanted


def _placeholders(text: str, given: Arguments) -> bool:
    return _at_least(len(re.findall(r"\[.*?\]", text)), given["num_placeholders"])


def _highlights(text: str, given: Arguments) -> bool:
    marked = re.findall(r"\*[^\n*]*\*", text) + re.findall(r"\*\*[^\n*]*\*\*", text)
    return _at_least(sum(bool(m.strip("* ")) for m in marked), given["num_highlights"])


def _title(text: str, _: Arguments) -> bool:
    return any(title.strip() for title in re.findall(r"<<([^\n]+?)>>", text))


def _is_json(text: str, _: Arguments) -> bool:
    bare = re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.IGNORECASE)
    try:
        json.loads(bare)
    except ValueError:
        return False
    return True


def _ends_with(text: str, given: Arguments) -> bool:
    end = given["end_phrase"].strip().lower()
    return text.strip().strip('"').lower().endswith(end)


def _postscript(text: str, given: Arguments) -> bool:
    marker = re.escape(given["postscript_marker"].strip().lower())
    return re.search(rf"^\s*{marker}", text.lower(), flags=re.MULTILINE) is not None


def _quoted(text: str, _: Arguments) -> bool:
    bare = text.strip()
    return len(bare) > 1 and bare[0] == bare[-1] == '"'


CHECKS: dict[str, Check] = {
    "length_constraints:number_words": _words,
    "length_constraints:number_paragraphs": _paragraphs,
    "keywords:existence": _keywords,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letters,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:title": _title,
    "detectable_format:json_format": _is_json,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "punctuation:no_comma": lambda text, _: "," not in text,
    "startend:end_checker": _ends_with,
    "startend:quotation": _quoted,
    "change_case:english_lowercase": lambda text, _: text.islower(),
    "change_case:english_capital": lambda text, _: text.isupper(),
}
