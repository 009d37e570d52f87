"""Questions to an endpoint, many at a time: within its limits, each paid for once, counted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from upath import UPath

from qresafe.artifacts import Run
from qresafe.chat.cache import AnswerCache
from qresafe.chat.client import Reply, connect, send
from qresafe.chat.limits import RateLimit
from qresafe.judge_specs import EndpointSpec
from qresafe.progress import Progress
from qresafe.stages.judge_engines import ASKED
from qresafe.stages.runtime import Batch, BatchFunction, Row, Runtime, read_parts

CHARACTERS_PER_TOKEN = 3  # a low guess, so that the token limit errs towards patience
BATCH = 64  # questions in a part


@dataclass(frozen=True)
class AskJob:
    """Questions to an endpoint: a `BatchJob` from rows with id and messages to `ASKED`.

    Args:
        spec: The endpoint, its limits and prices.
        cache: Where answers are kept; None: nowhere.
        share: The part of the limits that one worker may use, in (0, 1].
        likeliest: How many first tokens to ask log-probabilities of; 0: none. The answer is then
            JSON: {"text": ..., "top": {token: log-probability}}.
    """

    spec: EndpointSpec
    cache: str | None
    share: float = 1.0
    likeliest: int = 0

    def setup(self, device: str) -> BatchFunction:
        spec = self.spec
        client = connect(spec.endpoint, timeout=spec.timeout_seconds, retries=spec.retries)
        cache = AnswerCache(UPath(self.cache) if self.cache else None, spec.endpoint)
        limit = RateLimit(
            spec.requests_per_minute and spec.requests_per_minute * self.share,
            spec.tokens_per_minute and spec.tokens_per_minute * self.share,
        )

        def ask(row: Row) -> Row:
            request = self.request(row["messages"])
            reply = cache.get(request)
            if reply is not None:
                return self._answered(row, reply, cached=True)
            expected = _expected_tokens(request)
            limit.wait(expected)
            reply = send(client, request)
            limit.correct(expected, reply.prompt_tokens + reply.new_tokens or expected)
            cache.put(request, reply)
            return self._answered(row, reply, cached=False)

        def compute(rows: list[Row]) -> pa.Table:
            with ThreadPoolExecutor(spec.concurrency) as pool:
                return pa.Table.from_pylist(list(pool.map(ask, rows)), schema=ASKED)

        return compute

    def request(self, messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        """Return what is sent; the answer is cached by exactly this."""
        request = {
            "model": self.spec.model,
            "messages": [dict(message) for message in messages],
            "max_tokens": self.spec.max_new_tokens,
            "temperature": self.spec.temperature,
        }
        return request | (
            {"logprobs": True, "top_logprobs": self.likeliest} if self.likeliest else {}
        )

    def _answered(self, row: Row, reply: Reply, *, cached: bool) -> Row:
        answer = reply.text
        if self.likeliest:
            answer = json.dumps({"text": reply.text, "top": reply.top})
        return {
            "id": row["id"],
            "answer": None if reply.error else answer,
            "prompt_tokens": reply.prompt_tokens,
            "new_tokens": reply.new_tokens,
            "cached": cached,
            "error": reply.error,
        }


def ask_all(
    job: AskJob, questions: Sequence[Row], parts: UPath, runtime: Runtime, progress: Progress
) -> list[Row]:
    """Ask all questions, resumably, and return their answers in order.

    Args:
        job: Whom to ask, and how.
        questions: Rows with a unique `id` and `messages`.
        parts: Where parts go.
        runtime: Computes them.
        progress: Advances by questions.

    Returns:
        Rows of `ASKED`.
    """
    batches = [
        Batch(index, list(questions[start : start + BATCH]))
        for index, start in enumerate(range(0, len(questions), BATCH))
    ]
    if not batches:
        return []
    runtime.map_batches(job, batches, parts, progress)
    found = {row["id"]: row for row in read_parts(parts, len(batches)).to_pylist()}
    return [found[question["id"]] for question in questions]


def cache_folder(run: Run, spec: EndpointSpec) -> str | None:
    """Return where a run's storage keeps answers; None if the spec wants none kept."""
    return str(run.root.parent.parent / "cache" / "answers") if spec.cache else None


def usage(rows: Iterable[Row], spec: EndpointSpec | None = None) -> dict[str, Any]:
    """Return the manifest's counts of answers: requests, tokens, what they cost, and failures.

    Args:
        rows: Rows of `ASKED`.
        spec: The endpoint with its prices; None for a local model, which costs nothing.

    Returns:
        `prompt_tokens`, `new_tokens` and `cost` are of the requests that were sent, not of the
        `cached` ones; a request that failed may have cost something that the server did not say.
    """
    kept = list(rows)
    sent = [row for row in kept if not row["cached"]]
    prompt = sum(row["prompt_tokens"] for row in sent)
    new = sum(row["new_tokens"] for row in sent)
    kinds: dict[str, int] = {}
    for row in kept:
        if row["error"]:
            kind = row["error"].split(":")[0]
            kinds[kind] = kinds.get(kind, 0) + 1
    counts = {
        "asked": len(kept),
        "errors": sum(kinds.values()),
        "errors_by_kind": dict(sorted(kinds.items())),
        "prompt_tokens": prompt,
        "new_tokens": new,
    }
    if spec is None:
        return counts
    cost = prompt * spec.price_per_million_prompt + new * spec.price_per_million_answer
    return counts | {"cached": len(kept) - len(sent), "cost": round(cost / 1e6, 6)}


def usage_note(counts: Mapping[str, Any]) -> str:
    """Return the counts of `usage` as a short text."""
    words = [f"{counts['asked']} asked", f"{counts['errors']} errors"]
    if "cost" in counts:
        words += [f"{counts['cached']} from cache", f"cost {counts['cost']:.2f}"]
    return ", ".join(words)


def _expected_tokens(request: Mapping[str, Any]) -> int:
    characters = sum(len(message["content"]) for message in request["messages"])
    return int(characters / CHARACTERS_PER_TOKEN) + int(request["max_tokens"])
