"""Answers of servers on disk, by the content of the request: a question is paid for once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from upath import UPath

from qresafe.artifacts import write_bytes
from qresafe.chat.client import Reply
from qresafe.integrity import open_json, sealed_json


class AnswerCache:
    """One small JSON file per request; written whole or not at all, so that writers may race.

    Args:
        folder: Where the files go; any storage. None: nothing is kept.
        url: The server's base URL; the same request to another server is another question.
    """

    def __init__(self, folder: UPath | None, url: str) -> None:
        self._folder, self._url = folder, url

    def get(self, request: Mapping[str, Any]) -> Reply | None:
        """Return the kept answer to a request; None if there is none, or it is unreadable."""
        if self._folder is None:
            return None
        try:
            return Reply.model_validate(open_json(self._file(request).read_text()))
        except (FileNotFoundError, ValueError):
            return None

    def put(self, request: Mapping[str, Any], reply: Reply) -> None:
        """Keep an answer; failures are not kept, so that they are tried again."""
        if self._folder is None or reply.error:
            return
        file = self._file(request)
        file.parent.mkdir(parents=True, exist_ok=True)
        data = sealed_json(reply.model_dump(mode="json"), verbatim=True).encode()
        write_bytes(file, data)  # data: kept as it was answered

    def _file(self, request: Mapping[str, Any]) -> UPath:
        assert self._folder is not None
        content = json.dumps([self._url, request], sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(content.encode()).hexdigest()
        return self._folder / digest[:2] / f"{digest[2:]}.json"
