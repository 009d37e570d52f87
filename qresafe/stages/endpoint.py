"""Completions by any server that speaks OpenAI's chat API: the engine `openai`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from qresafe.chat.client import check_server, connect, send
from qresafe.errors import ModelError
from qresafe.specs import GenerateSpec
from qresafe.stages.conversation import converse
from qresafe.stages.engines import ANSWER, answer_row
from qresafe.stages.runtime import BatchFunction, Row


@dataclass(frozen=True)
class EndpointJob:
    """Completions by an OpenAI-compatible endpoint, several requests at a time.

    What still fails after the client's own retries is a row with `error`. Targets are not scored.
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
        spec = self.spec
        client = connect(str(spec.endpoint), timeout=spec.timeout_seconds, retries=spec.retries)

        def compute(rows: list[Row]) -> pa.Table:
            with ThreadPoolExecutor(spec.concurrency) as pool:

                def ask_all(some: list[Row], turn: int = 0) -> list[Row]:
                    return list(pool.map(lambda row: ask(client, row, spec), some))

                answers = ask_all(rows)
                converse(rows, answers, spec.system_prompt, ask_all)
            return pa.Table.from_pylist(answers, schema=ANSWER)

        return compute


def check_endpoint(spec: GenerateSpec) -> None:
    """Ask the endpoint for its models, before any work.

    Raises:
        ModelError: No key, no answer, a refused key, or a model that is not served there.
    """
    where = str(spec.endpoint)
    if not spec.endpoint_model:
        remedy = "set generate.endpoint_model to the name of a model that it serves"
        raise ModelError("no model is named for the endpoint", where=where, remedy=remedy)
    check_server(where, spec.endpoint_model, "generate.endpoint")


def ask(client: Any, row: Row, spec: GenerateSpec) -> Row:
    """Return the answer to one request, or a row that says why there is none.

    Raises:
        ModelError: The key is refused.
    """
    reply = send(client, parameters(row, spec))
    made = answer_row(
        row, text=reply.text, finish=reply.finish, new_tokens=reply.new_tokens, error=reply.error
    )
    return made | {"prompt_tokens": reply.prompt_tokens}


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
