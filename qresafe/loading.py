"""Specs from YAML files and `key=value` overrides, with errors that teach."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from qresafe.errors import SpecError, nearest
from qresafe.judge_specs import JUDGE_TAGS, MODEL_JUDGES, SECRET
from qresafe.redaction import looks_secret
from qresafe.registry import judges, quantizers
from qresafe.spec_base import EMPTY
from qresafe.spec_words import in_words
from qresafe.specs import Spec

S = TypeVar("S", bound=Spec)
# Errors that are found in a mapping as a whole, not in one of its keys.
WHOLE = ("value_error", "union_tag_invalid", "union_tag_not_found")
MOST_VALUES = 100_000  # in a spec; a real one has some hundreds
LARGEST = 1 << 20  # bytes of a spec's file


class _Loader(yaml.SafeLoader):
    """YAML whose only booleans are true and false: YAML 1.1 reads the key `on` as True."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def read_yaml(text: str) -> Any:
    """Return the data of a YAML text; only plain types are made.

    Raises:
        yaml.YAMLError: The text is malformed, or stands for far more than it holds.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > MOST_VALUES:
            raise yaml.YAMLError(f"it stands for more than {MOST_VALUES} values")
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("it is too deeply nested") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # PyYAML's constructors let these through, e.g. for the date 2026-02-31
        raise yaml.YAMLError(f"a value is malformed ({error})") from None


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Return how many values a node stands for, every alias counted in full.

    Ten lines of aliases to aliases can stand for billions of values.
    """
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1  # what contains itself is endless
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        inner = (part for each in parts for part in (each if isinstance(each, tuple) else (each,)))
        known[id(node)] = 1 + sum(_size(part, known) for part in inner)
    return known[id(node)]


def load_spec(
    kind: type[S],
    source: str | Path | Mapping[str, Any] | None = None,
    overrides: Iterable[str] = (),
) -> S:
    """Build a spec from a YAML file (or mapping) and dotted `key=value` overrides.

    Args:
        kind: The spec class, e.g. `ExperimentSpec`.
        source: A YAML file, a mapping, or None for all defaults.
        overrides: Strings such as "patch.mask.tau=0.4"; values are YAML.

    Raises:
        SpecError: The file is missing or no mapping, or a key or value is not accepted.
    """
    where = str(source) if isinstance(source, str | Path) else "the spec"
    data, overrides = _read(source), list(overrides)
    for override in overrides:
        _leave_other_method(data, override, kind)
    for override in overrides:
        _set(data, override)
    _refuse_secrets(data, where)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _explain(error, kind, where, overrides) from None


def _read(source: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    if source is None:
        return {}
    if isinstance(source, Mapping):
        return _deep_copy(source)
    path = Path(source)
    if not path.is_file():
        raise SpecError("no such spec file", where=str(path), remedy="give the path of a YAML file")
    if path.stat().st_size > LARGEST:
        remedy = "give the YAML file of an experiment"
        raise SpecError(f"no spec has more than {LARGEST} bytes", where=str(path), remedy=remedy)
    try:
        data = read_yaml(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"malformed YAML ({error})".replace("\n", " "), where=str(path)) from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise SpecError("the top level is not a mapping", where=str(path), remedy="use key: value")
    return data


def _deep_copy(data: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _deep_copy(v) if isinstance(v, Mapping) else v for k, v in data.items()}


def _set(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise SpecError(f"--set {override!r} has no value", remedy="write --set key=value")
    *parents, leaf = key.strip().split(".")
    node = data
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            # A preset's name stood here ("objective: paper"): keep it, as the base to override.
            raise SpecError(
                f"--set {key}: {parent!r} is {child!r} and has no keys of its own",
                remedy=f"set {'.'.join(parents)} to a mapping first",
            )
        node = child
    try:
        node[leaf] = read_yaml(text)
    except yaml.YAMLError:
        raise SpecError(f"--set {override!r}: the value is not YAML", remedy="quote it") from None


def _refuse_secrets(data: Any, where: str, key: str = "") -> None:
    """Refuse keys and passwords in a spec, which is stored beside the results."""
    if isinstance(data, Mapping):
        for name, value in data.items():
            _refuse_secrets(value, where, f"{key}.{name}" if key else str(name))
    elif isinstance(data, list):
        for place, value in enumerate(data):
            _refuse_secrets(value, where, f"{key}.{place}")
    elif isinstance(data, str) and looks_secret(data):
        remedy = "put it into the environment, e.g. OPENAI_API_KEY or HF_TOKEN"
        raise SpecError(
            f"{key or 'the spec'} holds a key or a password", where=where, remedy=remedy
        )


def _leave_other_method(data: dict[str, Any], override: str, kind: type[BaseModel]) -> None:
    """Drop the file's settings of one method where an override asks for another one."""
    key, _, method = (part.strip() for part in override.partition("="))
    *path, leaf = key.split(".")
    held: Any = data
    for part in path:
        held = held.get(part) if isinstance(held, dict) else None
    if leaf != "method" or path[:1] != ["quantize"] or not isinstance(held, dict):
        return
    chosen = [k for k in _kinds_at(kind, path) if _tag(k) == method]
    for other in set(held) - set(chosen[0].model_fields if chosen else held):
        del held[other]


def _explain(
    error: ValidationError, kind: type[BaseModel], where: str, overrides: Iterable[str]
) -> SpecError:
    found = error.errors()
    # A misspelt key first: that it is also missing under its right name says less.
    first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    location = [str(part) for part in first["loc"]]
    # pydantic puts a union's tag into the location; the user's key does not have it.
    tags = {*quantizers.names, *JUDGE_TAGS}
    key = ".".join(part for part in location if part not in tags)
    if _was_set(key, first["type"] in WHOLE, overrides):
        where = "--set"
    if first["type"] == "extra_forbidden":
        known = _keys_at(kind, location[:-1])
        return SpecError(f"unknown key {key!r}", where=where, remedy=nearest(location[-1], known))
    if first["type"].startswith("union_tag"):
        tag = str(first.get("ctx", {}).get("tag"))
        if "judges" in location and tag in judges.names:
            remedy = f"write {tag} without braces"
            return SpecError(f"the judge {tag!r} takes no settings", where=where, remedy=remedy)
        if "judges" in location:
            remedy = nearest(tag, MODEL_JUDGES)
            return SpecError(f"unknown judge {tag!r} with settings", where=where, remedy=remedy)
        allowed = str(first.get("ctx", {}).get("expected_tags", ""))  # "'rtn', 'bnb'"
        remedy = nearest(tag, [name.strip(" '") for name in allowed.split(",")])
        what = f"unknown quantizer {tag!r}"
        if tag in quantizers.names:
            what = f"{tag} cannot be {key}"
        elif not tag or tag == "None":
            what = f"{key}.method: {EMPTY}"
        return SpecError(what, where=where, remedy=remedy)
    value = first.get("input")
    plain = isinstance(value, str | int | float | bool) and first["type"] != SECRET
    shown = f" (got {value!r})" if plain else ""
    return SpecError(f"{key or 'spec'}: {in_words(first)}{shown}", where=where)


def _was_set(key: str, whole: bool, overrides: Iterable[str]) -> bool:
    """Return whether an override wrote `key`, or for an error of a whole mapping, into it."""
    written = [f"{text.partition('=')[0].strip()}." for text in overrides]
    below = whole and any(name.startswith(f"{key}.") for name in written)
    return below or any(f"{key}.".startswith(name) for name in written)


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the keys of `over`, mapping by mapping."""
    result = dict(base)
    for key, value in over.items():
        mappings = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if mappings else value
    return result


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"a": {"b": 1}} for {"a.b": 1}: dotted keys as the mapping that a spec takes."""
    result: dict[str, Any] = {}
    for key, value in flat.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        result = merged(result, value)
    return result


def value_types(kind: type[BaseModel], key: str) -> set[type]:
    """Return the plain types that a dotted key of a spec accepts; empty for an unknown key."""
    *parents, leaf = key.split(".")
    fields = [k.model_fields[leaf] for k in _kinds_at(kind, parents) if leaf in k.model_fields]
    return {found for field in fields for found in _plain_types(field.annotation)}


def _plain_types(annotation: Any) -> set[type]:
    if isinstance(annotation, type):
        return {annotation}
    return {found for part in get_args(annotation) for found in _plain_types(part)}


def _keys_at(kind: type[BaseModel], path: list[str]) -> set[str]:
    return {name for k in _kinds_at(kind, path) for name in k.model_fields}


def _kinds_at(kind: type[BaseModel], path: list[str]) -> list[type[BaseModel]]:
    kinds: list[type[BaseModel]] = [kind]
    for part in path:
        if part.isdigit():  # a place in a list
            continue
        tagged = [k for k in kinds if _tag(k) == part]
        if tagged:  # pydantic puts a union's tag into the location
            kinds = tagged
            continue
        fields = [k.model_fields[part] for k in kinds if part in k.model_fields]
        if fields:  # else it is a key of a mapping, or a place in a list, of these kinds
            kinds = [c for f in fields for c in _models_in(f.annotation)]
    return kinds


def _tag(kind: type[BaseModel]) -> str | None:
    for name in ("method", "judge"):
        if name in kind.model_fields and (values := get_args(kind.model_fields[name].annotation)):
            return str(values[0])  # of a Literal; a field of any name is no tag
    return None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]
