"""Taking secrets out of texts that are kept: errors, logs."""

from __future__ import annotations

import os
import re

_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
_SHORTEST = 8  # a shorter value is no secret, and would blank out ordinary words
# What gives itself away, wherever it came from.
_FORMS = re.compile(
    r"""hf_[A-Za-z0-9]{20,}            # Hugging Face
      | sk-[A-Za-z0-9_-]{20,}          # OpenAI
      | (?:AKIA|ASIA)[A-Z0-9]{16}      # AWS
      | (?<=://)[^\s/:@]+:[^\s/@]+(?=@)  # user:password@ of a URL
      | (?<=Bearer\s)[A-Za-z0-9._~+/=-]{8,}""",
    re.VERBOSE,
)
HIDDEN = "[hidden]"


def redacted(text: str) -> str:
    """Return `text` without the values of secret environment variables and what looks like one."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _NAMES.search(name) and not os.path.exists(value):
            text = text.replace(value, f"[{name}]")
    return _FORMS.sub(HIDDEN, text)
