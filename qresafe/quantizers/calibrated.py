"""What the calibrated quantizers share: their chats as token ids, and their integer scheme."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from qresafe.embedded.calibration import calibration_chats
from qresafe.errors import DataError
from qresafe.hf.chat import chat_ids
from qresafe.hf.finetune import Chat
from qresafe.hf.models import context_length, load_tokenizer
from qresafe.quantize_specs import CalibrationSpec


class Calibrated(Protocol):
    """A spec with calibration data.

    Attributes:
        calibration: Which chats.
        sequences: At most so many of them.
        max_length: Tokens kept of each.
        seed: Of the choice of embedded chats; of a user's, the first `sequences` are taken.
    """

    calibration: CalibrationSpec
    sequences: int
    max_length: int
    seed: int


def sequences(source: Path, spec: Calibrated) -> list[list[int]]:
    """Return the token ids of whole chats, cut at `max_length`.

    Args:
        source: The model, for its tokenizer and chat template.
        spec: Which chats, and how much of them.

    Raises:
        DataError: A user's file is malformed, or more chats are wanted than there are.
        ModelError: The tokenizer renders no chats.
    """
    tokenizer = load_tokenizer(source)
    chats = calibration_chats(spec.calibration, spec.seed)[: spec.sequences]
    rendered = (chat_ids(tokenizer, chat) for chat in chats)
    return [[*context, *answer][: spec.max_length] for context, answer in rendered]


def learned(source: Path, calibration: CalibrationSpec, seed: int) -> list[Chat]:
    """Return the token ids of the chats that a method fine-tunes on, none of them cut.

    Args:
        source: The model, for its tokenizer, chat template and context.
        calibration: Which chats.
        seed: Of their choice, where they are embedded ones.

    Raises:
        DataError: As for `calibration_chats`, or a chat is longer than the model's context.
        ModelError: The tokenizer renders no chats.
    """
    tokenizer, room = load_tokenizer(source), context_length(str(source))
    chats = [chat_ids(tokenizer, chat) for chat in calibration_chats(calibration, seed)]
    for number, (context, answer) in enumerate(chats, 1):
        tokens = len(context) + len(answer)
        if room is not None and tokens > room:
            what = f"chat {number} has {tokens} tokens, more than the {room} of the model's context"
            where = calibration.path or "quantize.calibration"
            raise DataError(what, where=where, remedy="shorten or remove it")
    return chats


def integers(bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:
    """Return compressed-tensors' arguments of integer weights; group size -1 is one per row."""
    scheme = {"num_bits": bits, "type": "int", "symmetric": symmetric}
    if group_size > 0:
        return scheme | {"strategy": "group", "group_size": group_size}
    return scheme | {"strategy": "channel"}
