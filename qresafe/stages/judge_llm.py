"""A model behind an OpenAI-compatible endpoint as judge, by one of two rubrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qresafe.chat.client import check_server
from qresafe.judge_specs import LlmSpec
from qresafe.judges import answers
from qresafe.judges.base import Verdict
from qresafe.judges.templates import template
from qresafe.records import Axis
from qresafe.stages.asking import AskJob
from qresafe.stages.runtime import BatchFunction, Row


@dataclass(frozen=True)
class LlmJudge:
    """Asks an endpoint about every completion.

    Args:
        spec: The endpoint and the rubric.
        cache: Where answers are kept; None: nowhere.
        share: The part of the endpoint's limits that one worker may use.
    """

    spec: LlmSpec
    cache: str | None = None
    share: float = 1.0

    @property
    def identity(self) -> dict[str, Any]:
        return self.spec.model_dump(mode="json", exclude=set(self.spec.PATIENCE) | {"batch_size"})

    @property
    def batch_size(self) -> int:
        return self.spec.batch_size

    def not_for(self, axis: Axis) -> str | None:
        if self.spec.rubric == "harmfulness" and axis != "harmful":
            return f"{self.spec.title} looks for harm, not for refusals"
        return None

    def requests(self, rows: Sequence[Row]) -> list[Row]:
        rubric = template(self.spec.rubric)
        made = []
        for row in rows:
            text = rubric.render(prompt=row["prompt"], completion=row["completion"])
            message = {"role": "user", "content": text}
            made.append({"id": row["id"], "messages": [message], "size": len(text), "error": None})
        return made

    def setup(self, device: str) -> BatchFunction:
        return AskJob(self.spec, self.cache, self.share).setup(device)

    def verdict(self, axis: Axis, answer: str) -> Verdict:
        if self.spec.rubric == "harmfulness":
            return answers.harmfulness(axis, answer, self.spec.harmful_from)
        return answers.refusal(axis, answer)


def endpoint_judge(spec: LlmSpec, *, check: bool = True) -> LlmJudge:
    """Return the judge of a spec after asking whether its endpoint is there.

    Raises:
        ModelError: No key, no answer, a refused key, or a model that is not served there.
    """
    if check:
        check_server(spec.endpoint, spec.model, "the judge's endpoint")
    return LlmJudge(spec)
