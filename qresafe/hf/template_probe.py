"""Chat templates are programs that come with a model: tried in a process that can be stopped.

transformers runs them in a sandbox, out of which they cannot reach; but they may loop for ever, or
fill the memory. A template can still wait for a certain prompt to do so.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from qresafe.errors import ModelError
from qresafe.hf.template_child import TOO_LARGE, TOO_LONG

CPU_SECONDS = 2  # a usual template takes milliseconds
PATIENCE = 60.0  # seconds by the clock, for machines that are busy with other things
MEMORY = 1 << 29

_MEANING = {
    TOO_LONG: "makes more than a million characters of a short chat",
    TOO_LARGE: "takes more than half a gibibyte of memory",
}


def check_template(tokenizer: Any, where: str) -> None:
    """Render short chats by a tokenizer's template, elsewhere and within limits.

    Args:
        tokenizer: One that has a chat template.
        where: The model, for messages.

    Raises:
        ModelError: There is no default template, or rendering takes too long or too much memory.
    """
    remedy = "look at chat_template.jinja, and do not use this model unless you trust it"
    try:
        template = tokenizer.get_chat_template()
    except ValueError:  # several, none of which is called "default"
        remedy = "name one of its templates default"
        raise ModelError("no default chat template", where=where, remedy=remedy) from None
    if not isinstance(template, str):
        raise ModelError("the chat template is no text", where=where, remedy=remedy)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    fault = _fault(template, json.dumps(special, sort_keys=True))
    if fault:
        raise ModelError(f"the chat template {fault}", where=where, remedy=remedy)


@functools.lru_cache(maxsize=64)
def _fault(template: str, variables: str) -> str:
    """Return what is wrong with a template's use of time and memory; empty: nothing."""
    given = {"template": template, "variables": json.loads(variables)}
    limits = {"seconds": CPU_SECONDS, "bytes": MEMORY}
    program = Path(__file__).with_name("template_child.py")
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(program)],
            input=json.dumps(given | limits),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return "does not come to an end"
    if done.returncode < 0:  # killed by the limit on processor time
        return f"does not come to an end within {CPU_SECONDS} s"
    return _MEANING.get(done.returncode, "")
