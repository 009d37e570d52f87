"""Hostile inputs by a seed: sound files that were damaged, twisted or filled with odd values."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from typing import Any

import yaml

# Values that programs stumble over, for places in JSON-able data.
ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**31, 2**63, -(2**64), 10**400, 1e308, -0.0, float("nan"), float("inf")),
    *("", " ", "\x00", "\ud800", "\u202e", "../../x", "/etc/passwd", "~", "a" * 10_000, "é\n'\""),
    *("<script>", "{{ 1 }}", "%s%n", "${HOME}", "s3://", "file:///etc/passwd", "http://[", "1e999"),
    *([], {}, [[]], [{}], {"": ""}, {"a": {"a": {"a": {}}}}, [None] * 50, [1, "a", None, {}]),
)
YAML_WORDS = (
    *(
        "&a [*a]",
        "&a {x: *a}",
        "*nowhere",
        "<<: *a",
        "<<: 3",
        "!!python/object/apply:os.system [x]",
    ),
    *("!!python/name:os.system", "!!binary ?", "!!set {a, b}", "!!timestamp x", "!!int x", "!!x y"),
    *("2026-02-31", "12:30:99", "0x", "0b", "1_000", ".nan", "-.inf", "9" * 5000, "? ", ": ", "- "),
    *(
        "\t",
        "\x00",
        "\ufeff",
        "---\n",
        "...\n",
        "%YAML 9.9\n",
        "|\n",
        ">\n",
        "'",
        '"',
        "[",
        "{",
        "}",
    ),
    *(
        "[" * 3000,
        "{a: " * 3000,
        "- " * 3000,
        "\n" * 100,
        "#",
        "@",
        "`",
        "\u2028",
        "~",
        "null: null",
    ),
)
TABLE_WORDS = (
    *('"', '""', ",", ";", "\t", "\r", "\n", "\r\n", "\x00", "\ufeff", "\u2028", "=1+1", "'", "\\"),
    *("," * 500, '"' * 501, "NaN", "null", "true", "1e999", "2026-02-31", "<script>", "\x1a", "é"),
)
JSON_WORDS = (
    *(
        "[" * 3000,
        '{"a":' * 3000,
        "NaN",
        "Infinity",
        "1e999",
        "9" * 5000,
        '"\\ud800"',
        "\x00",
        "\n",
    ),
    *('{"prompt": 3}', '{"prompt": null}', "[]", "{}", "null", '"', "\\", ",", '{"prompt": "a"}'),
)
TEMPLATE_WORDS = (
    *(
        "{{ 'a' * 10 ** 10 }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ 1 / 0 }}",
        "{{",
        "{%",
    ),
    *(
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
        "{#",
    ),
    *("{% include 'x' %}", "{% import 'os' as o %}", "{{ lipsum(n=1000) }}", "{{ messages[99] }}"),
    *(
        "{% set x = x %}",
        "{{ self }}",
        "{{ 9 ** 999 }}",
        "{{ '%s' % 1 }}",
        "{{ '%99999999d' % 1 }}",
    ),
    *("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ messages | tojson(indent=9999) }}"),
    *("{{ ['a' * 9999] * 9999 }}", "{{ 'a'.center(10 ** 9) }}", "{{ 'x' | indent(10 ** 9) }}"),
    *(
        "(" * 500,
        "{% if true %}" * 200,
        "\x00",
        "\ud7ff",
        "{{ range(10 ** 12) | list }}",
        "-%}",
        "}}",
    ),
)
NUMBERS = tuple(
    value.to_bytes(8, "little")[:size]
    for value in (0, 1, 0xFF, 0x7FFF_FFFF, 0xFFFF_FFFF, 2**63 - 1, 2**64 - 1)
    for size in (1, 4, 8)
)


def damaged(chance: random.Random, data: bytes, words: Sequence[bytes] = NUMBERS) -> bytes:
    """Return `data` after one to four cuts, flips, copies or insertions."""
    made = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        start, end = sorted(chance.randrange(len(made) + 1) for _ in range(2))
        end = min(end, start + chance.choice((1, 8, 64, 4096)))
        what = chance.randrange(6)
        if what == 0 and made:
            made[min(start, len(made) - 1)] ^= 1 << chance.randrange(8)
        elif what == 1:
            del made[start:end]
        elif what == 2:
            del made[start:]
        elif what == 3:
            made[start:start] = made[start:end] * chance.choice((1, 2, 50))
        elif what == 4:
            made[start:end] = chance.randbytes(end - start)
        else:
            made[start:start] = chance.choice(words)
    return bytes(made)


def damaged_head(chance: random.Random, data: bytes, head: int) -> bytes:
    """Return `data` with the damage in its first `head` bytes, where formats keep their tables."""
    return damaged(chance, data[:head]) + data[head:]


def damaged_text(chance: random.Random, text: str, words: Sequence[str]) -> bytes:
    """Return a text after damage, with words of its language in it."""
    spelled = [word.encode("utf-8", "surrogatepass") for word in words]
    return damaged(chance, text.encode(), spelled)


def twisted(chance: random.Random, data: Any) -> Any:
    """Return JSON-able data with one to three of its values replaced by odd ones, or renamed."""
    made = copy.deepcopy(data)
    for _ in range(chance.randint(1, 3)):
        holder, key = _place(chance, made)
        if holder is None:
            return chance.choice(ODD)
        if isinstance(holder, dict) and chance.random() < 0.2:
            holder[str(chance.choice(ODD))[:60]] = holder.pop(key)
        else:
            holder[key] = copy.deepcopy(chance.choice(ODD))
    return made


def twisted_json(chance: random.Random, data: Any) -> bytes:
    """Return twisted data as JSON, now and then damaged as text as well."""
    try:
        text = json.dumps(twisted(chance, data))
    except ValueError:  # a number with too many digits to be written
        text = "9" * 5000
    return damaged_text(chance, text, JSON_WORDS) if chance.random() < 0.2 else text.encode()


def twisted_yaml(chance: random.Random, data: Any) -> bytes:
    """Return twisted data as YAML."""
    try:
        return yaml.safe_dump(twisted(chance, data)).encode("utf-8", "surrogatepass")
    except (ValueError, UnicodeError):
        return b"x: " + b"9" * 5000


def setting(chance: random.Random, data: Any) -> str:
    """Return a hostile `key=value`, as `--set` takes it."""
    words: list[str] = []
    holder: Any = data
    while isinstance(holder, dict) and holder and (not words or chance.random() < 0.8):
        words.append(chance.choice(list(holder)))
        holder = holder[words[-1]]
    if chance.random() < 0.1:
        words.append(str(chance.choice(ODD))[:60])
    odd = chance.choice(ODD)
    plain = isinstance(odd, str | float | bool) or odd is None
    value = chance.choice(
        (
            str(odd) if plain else repr(odd)[:9000] if odd != 10**400 else "9" * 5000,
            chance.choice(YAML_WORDS),
        )
    )
    return f"{'.'.join(words)}={value}" if chance.random() < 0.95 else value


def _place(chance: random.Random, data: Any) -> tuple[Any, Any]:
    """Return a random container within `data`, and a key of it; None where `data` is none."""
    found: tuple[Any, Any] = (None, None)
    while isinstance(data, dict | list) and data:
        key = chance.choice(list(data)) if isinstance(data, dict) else chance.randrange(len(data))
        found, data = (data, key), data[key]
        if chance.random() < 0.25:
            break
    return found
