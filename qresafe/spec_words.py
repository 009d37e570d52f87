"""pydantic's complaints about a value of a user's, in our own words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qresafe.spec_base import EMPTY

# Kind of complaint -> what to say; a name in braces is of the complaint's own context.
WORDS = {
    "missing": "must be given",
    "string_type": "must be text",
    "string_pattern_mismatch": "must match {pattern}",
    "literal_error": "must be {expected}",
    "greater_than": "must be more than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "too_short": "needs at least {min_length} entries",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "must be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),
    **dict.fromkeys(("tuple_type", "list_type"), "must be a list, such as [a, b]"),
    **dict.fromkeys(
        ("model_type", "model_attributes_type", "dict_type"), "must be a mapping, such as {{a: 1}}"
    ),
}


def in_words(error: Mapping[str, Any]) -> str:
    """Return what is wrong with a value, as the end of a sentence that begins with its key.

    Args:
        error: One of a `ValidationError`'s `errors()`.
    """
    if error["type"] != "missing" and error.get("input") is None:
        return EMPTY
    if error["type"] in WORDS:
        return WORDS[error["type"]].format(**error.get("ctx", {}))
    return str(error["msg"]).removeprefix("Value error, ")
