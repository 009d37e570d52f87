"""A key-value cache that is allocated once, written in place and narrowed to the live rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
    """One full-attention layer whose keys and values lie in buffers of their final size.

    `DynamicLayer` concatenates at every step, which copies the whole cache for each new token.

    Args:
        capacity: Positions to make room for: prompt and new tokens.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._buffers = [self._room(states) for states in (key_states, value_states)]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[-2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start : self.length] = states
        self._expose()
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx` only."""
        if not self.is_initialized:
            return
        self._buffers = [self._gather(buffer, beam_idx) for buffer in self._buffers]
        self._expose()

    def _gather(self, buffer: Tensor, rows: Tensor) -> Tensor:
        kept = buffer[:, :, : self.length].index_select(0, rows.to(buffer.device))
        room = self._room(kept)
        room[:, :, : self.length] = kept
        return room

    def _room(self, like: Tensor) -> Tensor:
        rows, heads, _, width = like.shape
        return torch.empty(
            (rows, heads, self.capacity, width), dtype=like.dtype, device=like.device
        )

    def _expose(self) -> None:
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self._buffers)


def preallocated_cache(model: Any, capacity: int) -> Cache:
    """Return a cache for `model` with room for `capacity` positions.

    Sliding-window and linear-attention layers, which are small, stay as transformers makes them.
    """
    cache = DynamicCache(config=model.config)
    cache.layers = [
        PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer
        for layer in cache.layers
    ]
    return cache
