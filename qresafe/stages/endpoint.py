"""Completions by any server that speaks OpenAI's chat API: the engine `openai`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from qresafe.errors import ModelError, nearest
from qresafe.specs import GenerateSpec
from qresafe.stages.conversation import converse
from qresafe.stages.engines import ANSWER, answer_row
from qresafe.stages.runtime import BatchFunction, Row

KEY = "OPENAI_API_KEY"  # only from the environment: specs are stored beside the results
CHECK_SECONDS = 10.0


@dataclass(frozen=True)
class EndpointJob:
    """Completions by an OpenAI-compatible endpoint, several requests at a time.

    Rate limits, server errors and time-outs are tried again with growing pauses by the `openai`
    package; what still fails is a row with `error`. Targets are not scored.
    """

    model: Any  # unused: the endpoint is the model
    spec: GenerateSpec

    def requests(self, prompts: Sequence[Row]) -> list[Row]:
        check_endpoint(self.spec)
        return [
            {
                "prompt_id": row["prompt_id"],
                "prompt": row["prompt"],
                "prompt_ids": [],
                "target_ids": [],
                "size": len(row["prompt"]),
            }
            | ({"follow_ups": row["follow_ups"]} if row.get("follow_ups") else {})
            for row in prompts
        ]

    def setup(self, device: str) -> BatchFunction:
        client = connect(self.spec, timeout=self.spec.timeout_seconds, retries=self.spec.retries)

        def compute(rows: list[Row]) -> pa.Table:
            with ThreadPoolExecutor(self.spec.concurrency) as pool:

                def ask_all(some: list[Row], turn: int = 0) -> list[Row]:
                    return list(pool.map(lambda row: ask(client, row, self.spec), some))

                answers = ask_all(rows)
                converse(rows, answers, self.spec.system_prompt, ask_all)
            return pa.Table.from_pylist(answers, schema=ANSWER)

        return compute


def connect(spec: GenerateSpec, *, timeout: float, retries: int) -> Any:
    """Return a client for the spec's endpoint; nothing is sent yet.

    Raises:
        ModelError: There is no key in the environment.
    """
    import openai

    key = os.environ.get(KEY)
    if not key:
        remedy = f"export {KEY} (any word will do for a server without keys)"
        raise ModelError(f"no {KEY} in the environment", where=str(spec.endpoint), remedy=remedy)
    return openai.OpenAI(api_key=key, base_url=spec.endpoint, timeout=timeout, max_retries=retries)


def check_endpoint(spec: GenerateSpec) -> None:
    """Ask the endpoint for its models, before any work.

    Raises:
        ModelError: No key, no answer, a refused key, or a model that is not served there.
    """
    import openai

    where = str(spec.endpoint)
    if not spec.endpoint_model:
        remedy = "set generate.endpoint_model to the name of a model that it serves"
        raise ModelError("no model is named for the endpoint", where=where, remedy=remedy)
    client = connect(spec, timeout=CHECK_SECONDS, retries=1)
    try:
        served = [model.id for model in client.models.list()]
    except (openai.AuthenticationError, openai.PermissionDeniedError):
        raise ModelError("the key is refused", where=where, remedy=f"check {KEY}") from None
    except openai.APIConnectionError as error:
        cause = error.__cause__ or error
        remedy = "start the server, or mend generate.endpoint (it usually ends in /v1)"
        raise ModelError(f"no answer ({cause})", where=where, remedy=remedy) from None
    except (openai.APIError, ValueError):
        return  # it answers, but has no list of models: some servers do not
    if served and spec.endpoint_model not in served:
        what = f"no model {spec.endpoint_model!r}"
        raise ModelError(what, where=where, remedy=nearest(spec.endpoint_model, served))


def ask(client: Any, row: Row, spec: GenerateSpec) -> Row:
    """Return the answer to one request, or a row that says why there is none."""
    import openai

    try:
        reply = client.chat.completions.create(**parameters(row, spec))
        choice = reply.choices[0]
        text = choice.message.content
    except (openai.OpenAIError, ValueError, TypeError, LookupError, AttributeError) as error:
        return answer_row(row, finish="error", error=_reason(error))
    if choice.finish_reason not in ("stop", "length") or text is None:
        reason = f"no answer: finish_reason {choice.finish_reason!r}"
        return answer_row(row, finish="error", error=reason)
    used = reply.usage
    made = answer_row(
        row,
        text=text,
        finish=choice.finish_reason,
        new_tokens=used.completion_tokens if used else 0,
    )
    return made | {"prompt_tokens": used.prompt_tokens if used else 0}


def parameters(row: Row, spec: GenerateSpec) -> dict[str, Any]:
    """Return the request: the prompt, the sampling settings, and a seed of its own."""
    system = [{"role": "system", "content": spec.system_prompt}] if spec.system_prompt else []
    chat = row.get("messages") or [*system, {"role": "user", "content": row["prompt"]}]
    digest = hashlib.sha256(f"{spec.seed}/{row['prompt_id']}/{row['sample']}".encode()).digest()
    request = {
        "model": spec.endpoint_model,
        "messages": chat,
        "max_tokens": spec.max_new_tokens,
        "temperature": spec.temperature,
        "top_p": spec.top_p,
        "seed": int.from_bytes(digest[:4], "little") >> 1,
    }
    return request | ({"extra_body": {"top_k": spec.top_k}} if spec.top_k else {})


def _reason(error: Exception) -> str:
    kind = {
        "RateLimitError": "rate limit",
        "APITimeoutError": "time-out",
        "APIConnectionError": "no connection",
        "InternalServerError": "server error",
        "BadRequestError": "refused request",
    }.get(type(error).__name__, "malformed answer")
    return f"{kind}: {' '.join(str(error).split())[:200]}"
