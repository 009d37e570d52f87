"""What judge models say without writing: label probabilities, and those of a few next tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qresafe.errors import ModelError
from qresafe.hf.batching import left_pad, right_pad
from qresafe.hf.generate import accepted


@dataclass(frozen=True)
class Encoded:
    """A text, or a pair of texts, as a sequence classifier reads it.

    Attributes:
        ids: Token ids with the tokenizer's special ones.
        types: Which of the two texts each token belongs to; empty where the model has no types.
    """

    ids: list[int]
    types: list[int]


def encode(tokenizer: Any, first: str, second: str | None = None) -> Encoded:
    """Encode a text, or a pair of texts, without cutting anything."""
    made = tokenizer(first, second, truncation=False, verbose=False)
    return Encoded(list(made["input_ids"]), list(made.get("token_type_ids", [])))


def label_probabilities(model: Any, tokenizer: Any, texts: Sequence[Encoded]) -> Tensor:
    """Return the probability of each label: (rows, labels) float32 on the CPU, rows sum to 1.

    Args:
        model: A sequence classifier in evaluation mode.
        tokenizer: Its tokenizer, for the padding.
        texts: At least one; similar lengths waste least.

    Raises:
        ModelError: Texts of unequal length need padding, but there is no padding token.
    """
    pad = tokenizer.pad_token_id
    if pad is None:
        remedy = "set pad_token in its tokenizer_config.json"
        raise ModelError(
            "the classifier has no padding token",
            where=str(tokenizer.name_or_path),
            remedy=remedy,
        )
    if model.config.pad_token_id is None:  # decoders look for the last token before the padding
        model.config.pad_token_id = pad
    ids, mask = right_pad([text.ids for text in texts], pad)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if texts[0].types:
        inputs["token_type_ids"] = right_pad([text.types for text in texts], 0)[0]
    with torch.no_grad():
        logits = model(**{name: value.to(model.device) for name, value in inputs.items()}).logits
    return logits.float().softmax(dim=-1).cpu()


def next_token_probabilities(
    model: Any, prompts: Sequence[Sequence[int]], tokens: Sequence[int]
) -> Tensor:
    """Return the probabilities of `tokens` after each prompt, among themselves.

    Args:
        model: A causal LM in evaluation mode.
        prompts: Token ids of each prompt, non-empty.
        tokens: The tokens to compare.

    Returns:
        (rows, tokens) float32 on the CPU; rows sum to 1.
    """
    ids, mask = left_pad(prompts, 0)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    optional = {"position_ids": positions.to(model.device), "logits_to_keep": 1}
    inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    with torch.no_grad():
        logits = model(**inputs, **accepted(type(model), optional)).logits
    chosen = logits[:, -1, list(tokens)]
    return chosen.float().softmax(dim=-1).cpu()
