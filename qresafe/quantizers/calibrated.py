"""What the calibrated quantizers share: their token ids and their integer scheme."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from qresafe.embedded.calibration import calibration_chats
from qresafe.hf.chat import chat_ids
from qresafe.hf.models import load_tokenizer
from qresafe.quantize_specs import CalibrationSpec


class Calibrated(Protocol):
    """A spec with calibration data.

    Attributes:
        calibration: Which chats.
        sequences: At most so many of them.
        max_length: Tokens kept of each.
        seed: Of the choice of chats.
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


def integers(bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:
    """Return compressed-tensors' arguments of integer weights; group size -1 is one per row."""
    scheme = {"num_bits": bits, "type": "int", "symmetric": symmetric}
    if group_size > 0:
        return scheme | {"strategy": "group", "group_size": group_size}
    return scheme | {"strategy": "channel"}
