"""Logits at chosen positions only: the output head is the widest layer, most rows need none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class AnswerHead:
    """Makes a causal LM apply its output head to selected positions.

    A hook in front of the head picks the positions, so whatever the model does with its logits
    (soft caps, scaling) happens as usual, for any architecture with `get_output_embeddings`.

    Args:
        model: A Hugging Face causal LM.
    """

    def __init__(self, model: Any) -> None:
        self._positions: Tensor | None = None
        model.get_output_embeddings().register_forward_pre_hook(self._select)

    def logits(self, forward: Callable[..., Any], ids: Tensor, positions: Tensor) -> Tensor:
        """Return logits (N, vocabulary) at N positions.

        Args:
            forward: The model, or an engine around it.
            ids: (sequences, columns), padded at the right: attention is causal, so no mask is
                needed.
            positions: (N,) indices into the flattened `ids`.
        """
        self._positions = positions
        try:
            found: Tensor = forward(input_ids=ids, use_cache=False).logits[0]
        finally:
            self._positions = None
        return found

    def _select(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._positions is None:
            return None
        hidden, *rest = inputs
        positions = self._positions.to(hidden.device)  # the last of several GPUs, it may be
        return (hidden.flatten(0, 1)[positions][None], *rest)
