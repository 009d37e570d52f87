"""The prompts that model judges were made for: one data file each, with its source and licence."""

from __future__ import annotations

import functools
import re
from importlib.resources import files
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict

AnswerForm = Literal["llama_guard", "wildguard", "yes_no", "score"]


class Template(BaseModel):
    """A judge's prompt, word for word as published.

    Attributes:
        source: Where it is published.
        licence: Under what.
        prompt: The text, with places such as `{prompt}` and `{completion}`.
        system: A system message of its own, for chat models.
        special_tokens: Whether the tokenizer adds its own (else the prompt writes them).
        max_new_tokens: How long the judge's answer can be; 0: next-token probabilities are read.
        strip: Whether white space around the prompt and the completion is taken off first.
        answer: How the answer is written.
        completion_tokens: Longer completions are cut to this many tokens; None: never.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    licence: str
    prompt: str
    system: str = ""
    special_tokens: bool = True
    max_new_tokens: int = 0
    strip: bool = False
    answer: AnswerForm | None = None
    completion_tokens: int | None = None

    def render(self, **texts: str) -> str:
        """Return the prompt with its places filled; braces inside the texts stay as they are."""
        given = {key: text.strip() for key, text in texts.items()} if self.strip else texts
        return fill(self.prompt, given)


def fill(template: str, texts: dict[str, str]) -> str:
    """Return `template` with each `{name}` of `texts` replaced once, whatever the texts hold."""
    places = re.compile("|".join(re.escape(f"{{{name}}}") for name in texts))
    return places.sub(lambda place: texts[place.group()[1:-1]], template)


@functools.cache
def template(name: str) -> Template:
    """Return the template of this name."""
    return Template.model_validate(read_data(name))


def read_data(name: str) -> Any:
    """Return the data of `templates/<name>.yaml`."""
    file = files("qresafe.judges").joinpath("templates", f"{name}.yaml")
    return yaml.safe_load(file.read_text("utf-8"))
