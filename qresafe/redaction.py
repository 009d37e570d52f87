"""Keys and passwords, taken out of every text that leaves the program.

Secrets come from the environment or from files, never from specs. Should one get into a text all
the same (an error of a library, a URL, a spec's field), it is replaced before the text is printed
or written: `qresafe.artifacts.write_text`, `UserError` and the command line's output see to that.
Prompts and completions in Parquet files are data, and stay as they are.
"""

from __future__ import annotations

import contextlib
import html
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TextIO, cast
from urllib.parse import quote

HIDDEN = "[redacted]"
SHORTEST = 8  # a shorter value is as likely to be a word that occurs by chance

_NAMED_SECRET = re.compile(
    r"TOKEN(?!IZER)|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL", re.IGNORECASE
)
_NAMES_A_PLACE = re.compile(r"_(PATH|FILE|DIR|MODE|URL|URI|HOST|ENDPOINT)$", re.IGNORECASE)

# Each hides the whole match, or the group `secret` where there is one. What may fail to match after
# a repetition has a bound: no text makes them slow.
_SHAPES = [
    re.compile(pattern)
    for pattern in (
        r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{16,}",  # Hugging Face
        r"(?<![A-Za-z0-9])sk-(?=[A-Za-z_-]{0,60}[0-9])[A-Za-z0-9_-]{16,}",  # OpenAI and the like
        r"(?<![A-Za-z0-9])(?:AKIA|ASIA|AIDA|AROA)[A-Z0-9]{16}(?![A-Z0-9])",  # AWS
        r"(?<![A-Za-z0-9])AIza[A-Za-z0-9_-]{35}",  # Google
        r"(?<![A-Za-z0-9])(?:gh[oprsu]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,})",
        r"(?<![A-Za-z0-9])xox[abprs]-[A-Za-z0-9-]{10,}",  # Slack
        # a JSON Web Token
        r"(?<![A-Za-z0-9])eyJ[A-Za-z0-9_-]{8,500}\.[A-Za-z0-9_-]{8,3000}\.[A-Za-z0-9_-]*",
        r"(?i)aws_secret_access_key\W{1,6}(?P<secret>[A-Za-z0-9/+=]{20,})",
        r"(?i)\bauthorization\W{1,6}(?:(?:bearer|basic|token)\s{1,3})?"
        r"(?P<secret>[A-Za-z0-9._~+/=-]{8,})",
        r"(?i)\bbearer\s{1,3}(?P<secret>(?=[A-Za-z._~+/=-]{0,60}[0-9])[A-Za-z0-9._~+/=-]{12,})",
        # user:password@ of a URL; a user alone is no secret
        r"(?<=://)(?P<secret>[^\s/:@\"'<>\\]{0,200}:[^\s/\"'<>\\]{0,500})@",
        r"(?i)[?&](?:[a-z0-9_-]{0,40}(?:token|key|secret|password|signature|credential)|sig)="
        r"(?P<secret>[^\s&\"'<>\\]+)",
        r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----[\s\S]{0,8000}?"
        r"(?:-----END [A-Z ]{0,30}PRIVATE KEY-----|\Z)",
    )
]


def redact(text: str) -> str:
    """Return `text` without keys and passwords: known shapes, and values of the environment's."""
    for secret in _secrets_here():
        text = text.replace(secret, HIDDEN)
    for shape in _SHAPES:
        text = shape.sub(_hide, text)
    return text


def redact_data(data: Any) -> Any:
    """Return JSON-able data without secrets: for formats that fold or escape text, as YAML does."""
    return json.loads(redact(json.dumps(data)))


def looks_secret(text: str) -> bool:
    """Return whether a text holds something of a secret's shape, whatever the environment says."""
    return any(shape.search(text) for shape in _SHAPES)


def secret_values(environment: Mapping[str, str]) -> list[str]:
    """Return the values of variables that are named like secrets, longest first.

    Left out are values too short to be told from ordinary words, and names of files: a path to
    a token is told to people who look for it.
    """
    found = {
        value
        for name, value in environment.items()
        if _NAMED_SECRET.search(name)
        and not _NAMES_A_PLACE.search(name)
        and len(value) >= SHORTEST
        and not os.path.exists(value)
    }
    return sorted(found, key=lambda value: (-len(value), value))


@contextlib.contextmanager
def redacted_output() -> Iterator[None]:
    """Let nothing reach stdout and stderr but through `redact`."""
    with (
        contextlib.redirect_stdout(cast(TextIO, _Redacting(sys.stdout))),
        contextlib.redirect_stderr(cast(TextIO, _Redacting(sys.stderr))),
    ):
        yield


class _Redacting:
    """A text stream that hides secrets; all else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _hide(match: re.Match[str]) -> str:
    if "secret" not in match.re.groupindex:
        return HIDDEN
    begin, end = (place - match.start() for place in match.span("secret"))
    return match[0][:begin] + HIDDEN + match[0][end:]


def _secrets_here() -> Iterator[str]:
    """Yield this environment's secrets as they may be spelled: plain, in JSON, HTML or a URL."""
    for value in secret_values(os.environ):
        in_json = (json.dumps(value, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False))
        spelled = (value, *in_json, html.escape(value), quote(value, safe=""))
        yield from dict.fromkeys(spelled)
