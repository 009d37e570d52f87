"""The chats that a fine-tuning quantizer sees: the embedded ones, or a user's JSONL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qresafe.errors import DataError
from qresafe.hf.chat import Message
from qresafe.specs import CalibrationSpec

ROLES = ("system", "user", "assistant")


def calibration_chats(spec: CalibrationSpec, seed: int) -> list[list[Message]]:
    """Return the chats that `spec` describes.

    Raises:
        DataError: A user's file is missing, empty or malformed; the message has the line.
    """
    if spec.path is not None:
        return read_chats(Path(spec.path))
    from qresafe.embedded.calibration import calibration_chats as embedded_chats

    return embedded_chats(spec, seed)


def read_chats(path: Path) -> list[list[Message]]:
    """Read a JSONL file of {"messages": [{"role": ..., "content": ...}, ...]}; blank lines pass.

    Raises:
        DataError: As `calibration_chats`.
    """
    remedy = 'write one {"messages": [...]} per line, ending in an assistant message'
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the calibration chats ({error})", remedy=remedy) from None
    chats = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        problem, messages = _parse(line)
        if problem:
            raise DataError(problem, where=f"{path}, line {number}", remedy=remedy)
        chats.append(messages)
    if not chats:
        raise DataError("no calibration chats", where=str(path), remedy=remedy)
    return chats


def _parse(line: str) -> tuple[str, list[Message]]:
    """Return (what is wrong, or "") and the messages of one line."""
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError):
        return "not JSON", []
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or len(messages) < 2:
        return "no list of two or more messages", []
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            return f"a message's role is not one of {', '.join(ROLES)}", []
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            return "a message's content is missing, empty or no text", []
    if messages[-1]["role"] != "assistant":
        return "the last message is not the assistant's", []
    return "", [{"role": m["role"], "content": m["content"]} for m in messages]
