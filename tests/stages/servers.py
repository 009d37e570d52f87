"""A chat server on loopback that fails in every way that real ones do."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

Answer = Callable[[dict[str, Any]], str]


class ChatServer:
    """Answers chats by a function of the request; words in the last message make it fail.

    `LIMITED` answers 429 once with Retry-After, `ALWAYS-LIMITED` forever; `BROKEN` 500 once;
    `HANGS` never; `CUT` a JSON that stops half-way; `REVOKED` 401; `FILTERED` without content.

    Attributes:
        calls: How often each last message arrived.
        times: When requests arrived, in seconds.
        most: The most requests that were being answered at the same time.
    """

    def __init__(self, answer: Answer, key: str = "right") -> None:
        self.answer, self.key = answer, key
        self.calls: Counter[str] = Counter()
        self.times: list[float] = []
        self.most = self._now = 0
        self.bodies: list[dict[str, Any]] = []

    def app(self) -> Starlette:
        chat = Route("/v1/chat/completions", self.chat, methods=["POST"])
        return Starlette(routes=[Route("/v1/models", self.models), chat])

    async def models(self, request: Request) -> Response:
        if request.headers["authorization"] != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "bad key"}}, 401)
        entry = {"id": "toy", "object": "model", "created": 0, "owned_by": "x"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.times.append(time.monotonic())
        self._now += 1
        self.most = max(self.most, self._now)
        try:
            return await self._reply(body)
        finally:
            self._now -= 1

    async def _reply(self, body: dict[str, Any]) -> Response:
        text = body["messages"][-1]["content"]
        self.calls[text] += 1
        first = self.calls[text] == 1
        soon = {"retry-after": "0.01"}
        if "ALWAYS-LIMITED" in text or ("LIMITED" in text and first):
            return JSONResponse({"error": {"message": "slow down"}}, 429, soon)
        if "BROKEN" in text and first:
            return JSONResponse({"error": {"message": "oops"}}, 500, soon)
        if "REVOKED" in text:
            return JSONResponse({"error": {"message": "bad key"}}, 401)
        if "HANGS" in text:
            await asyncio.sleep(60)
        if "CUT" in text:
            return Response('{"id": "x", "choices": [{"mess', media_type="application/json")
        content = None if "FILTERED" in text else self.answer(body)
        return JSONResponse(self._completion(content, body))

    def _completion(self, content: str | None, body: dict[str, Any]) -> dict[str, Any]:
        finish = "content_filter" if content is None else "stop"
        message = {"role": "assistant", "content": content}
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "message": message}
        if body.get("logprobs"):
            tops = json.loads(content or "{}")
            best = max(tops, key=tops.__getitem__)
            message["content"] = best
            listed = [{"token": t, "logprob": p, "bytes": None} for t, p in tops.items()]
            token = {"token": best, "logprob": tops[best], "bytes": None, "top_logprobs": listed}
            choice["logprobs"] = {"content": [token], "refusal": None}
        usage = {"prompt_tokens": 30, "completion_tokens": 5, "total_tokens": 35}
        head = {"id": "x", "object": "chat.completion", "created": 0, "model": "toy"}
        return head | {"choices": [choice], "usage": usage}


@contextmanager
def serving(server: ChatServer) -> Iterator[str]:
    """Run `server` on a free port of this machine and yield its base URL."""
    runner = uvicorn.Server(uvicorn.Config(server.app(), port=0, log_level="critical"))
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    while not runner.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{runner.servers[0].sockets[0].getsockname()[1]}/v1"
    runner.should_exit = runner.force_exit = True
    thread.join(5)


def keyed(monkeypatch: Any, answer: Answer) -> Iterator[tuple[str, ChatServer]]:
    """Yield the URL and the state of a server that the environment's key opens: for fixtures."""
    monkeypatch.setenv("OPENAI_API_KEY", "right")
    state = ChatServer(answer)
    with serving(state) as url:
        yield url, state
