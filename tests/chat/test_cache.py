"""The cache of answers: by content, whole files only, safe when many write at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from upath import UPath

from qresafe.chat.cache import AnswerCache
from qresafe.chat.client import Reply

REQUEST = {"model": "toy", "messages": [{"role": "user", "content": "How?"}], "temperature": 0.0}
REPLY = Reply(text="So.", finish="stop", prompt_tokens=3, new_tokens=2)
URL = "http://127.0.0.1:1/v1"


def test_a_question_is_answered_from_its_own_content(tmp_path: Path) -> None:
    cache = AnswerCache(UPath(tmp_path), URL)
    assert cache.get(REQUEST) is None
    cache.put(REQUEST, REPLY)
    assert AnswerCache(UPath(tmp_path), URL).get(dict(reversed(REQUEST.items()))) == REPLY
    assert cache.get(REQUEST | {"model": "other"}) is None
    assert cache.get(REQUEST | {"temperature": 0.5}) is None
    assert AnswerCache(UPath(tmp_path), "http://other/v1").get(REQUEST) is None


def test_failures_are_not_kept(tmp_path: Path) -> None:
    cache = AnswerCache(UPath(tmp_path), URL)
    cache.put(REQUEST, Reply(error="time-out: x"))
    assert cache.get(REQUEST) is None


@pytest.mark.parametrize("content", ["", '{"text": "S', "[]", '{"text": 3}'])
def test_a_damaged_file_is_no_answer(tmp_path: Path, content: str) -> None:
    cache = AnswerCache(UPath(tmp_path), URL)
    cache.put(REQUEST, REPLY)
    (file,) = tmp_path.rglob("*.json")
    file.write_text(content)
    assert cache.get(REQUEST) is None
    cache.put(REQUEST, REPLY)
    assert cache.get(REQUEST) == REPLY


def test_many_writers_of_the_same_answer(tmp_path: Path) -> None:
    cache = AnswerCache(UPath(tmp_path), URL)

    def write_and_read(_: int) -> Reply | None:
        cache.put(REQUEST, REPLY)
        return cache.get(REQUEST)

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(write_and_read, range(200))) == {None, REPLY} - {None}
    assert len(list(tmp_path.rglob("*"))) == 2  # a folder and a file: nothing is left behind


def test_no_folder_keeps_nothing() -> None:
    cache = AnswerCache(None, URL)
    cache.put(REQUEST, REPLY)
    assert cache.get(REQUEST) is None
