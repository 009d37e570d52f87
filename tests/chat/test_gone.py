"""A server that goes away in the midst of the work is not a row that could not be judged."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

from qresafe.chat.client import connect, send
from qresafe.errors import ModelError

REQUEST = {"model": "toy", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "right")


def test_where_nothing_listens_the_work_stops() -> None:
    client = connect("http://127.0.0.1:9/v1", timeout=2, retries=0)  # the port of `discard`
    with pytest.raises(ModelError, match=r"the server is gone .*same command again"):
        send(client, REQUEST)


def test_one_request_that_breaks_the_connection_is_one_row() -> None:
    def create(**_: Any) -> None:
        raise openai.APIConnectionError(request=httpx.Request("POST", "http://127.0.0.1/v1"))

    there = SimpleNamespace(models=SimpleNamespace(list=lambda: []))
    client = SimpleNamespace(
        chat=SimpleNamespace(completions=SimpleNamespace(create=create)),
        with_options=lambda **_: there,
        base_url="http://127.0.0.1/v1",
    )
    assert str(send(client, REQUEST).error).startswith("no connection")
