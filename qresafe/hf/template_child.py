"""Renders a model's chat template within limits of time and memory; a program of its own.

`qresafe.hf.template_probe` starts it. It reads JSON from stdin and imports next to nothing, so that
it costs a tenth of a second; its environment is what transformers renders with.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

import jinja2.ext
from jinja2.nodes import CallBlock
from jinja2.sandbox import ImmutableSandboxedEnvironment

LONGEST = 1_000_000  # characters that a chat of three short messages may come to
TOO_LONG, TOO_LARGE = 3, 4  # exit codes

HELLO = {"role": "user", "content": "Hello, how are you?"}
ANSWER = {"role": "assistant", "content": "I am well."}
SYSTEM = {"role": "system", "content": "Be kind."}
CHATS = ([HELLO], [SYSTEM, HELLO], [HELLO, ANSWER], [HELLO, ANSWER, HELLO])


class _Generation(jinja2.ext.Extension):
    """The tag `generation`, which some templates put around the assistant's words."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller: Any) -> Any:
        return caller()


def environment() -> ImmutableSandboxedEnvironment:
    """Return an environment like that of `apply_chat_template`."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )

    def fail(message: str) -> None:
        raise jinja2.TemplateError(message)

    made.globals |= {"raise_exception": fail, "strftime_now": lambda format: "1 January"}
    made.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
    return made


def main() -> int:
    """Return 0 unless the template takes too much; that it fails is not for this to judge."""
    given = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_AS, (given["bytes"], given["bytes"]))
    resource.setrlimit(resource.RLIMIT_CPU, (given["seconds"], given["seconds"] + 1))
    for chat in CHATS:
        for opening in (False, True):
            variables = given["variables"] | {"messages": chat, "add_generation_prompt": opening}
            try:
                template = environment().from_string(given["template"])
                text = template.render(tools=None, documents=None, **variables)
            except MemoryError:
                return TOO_LARGE
            except Exception:
                continue
            if len(text) > LONGEST:
                return TOO_LONG
    return 0


if __name__ == "__main__":
    sys.exit(main())
