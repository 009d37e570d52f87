"""The next token of each row: the likeliest, or drawn with noise that belongs to the row alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

if TYPE_CHECKING:  # so that a bare GPU machine needs no pydantic (bench/gpu.py)
    from qresafe.specs import GenerateSpec


class Sampler:
    """Greedy at temperature 0; otherwise the Gumbel-max trick, argmax(logits/T + Gumbel noise).

    Every row draws its noise from its own generator, seeded by (spec.seed, key), one draw of the
    vocabulary's size per step. A completion therefore does not depend on which rows share its
    batch, and two models that answer the same prompt see the same noise, so that differences
    between their answers come from the models.

    Args:
        spec: temperature, top_k (0: all), top_p (1: all) and seed.
        keys: One key per row, e.g. prompt id and sample number.
        device: Where the logits are; noise differs between kinds of device.
    """

    def __init__(self, spec: GenerateSpec, keys: Sequence[str], device: torch.device) -> None:
        self.greedy = spec.temperature == 0
        self._warp = _warpers(spec)
        self._generators = [] if self.greedy else [_generator(spec.seed, k, device) for k in keys]

    def pick(self, logits: Tensor) -> Tensor:
        """Return the next token of each row.

        Args:
            logits: (rows, vocabulary).

        Returns:
            (rows,) int64.
        """
        if self.greedy:
            return logits.argmax(dim=-1)
        scores = self._warp(None, logits.float())
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return (scores - noise.log()).argmax(dim=-1)  # -log of an exponential is a Gumbel

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        if not self.greedy:
            self._generators = [self._generators[row] for row in rows]


def _warpers(spec: GenerateSpec) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if spec.temperature not in (0.0, 1.0):
        warpers.append(TemperatureLogitsWarper(spec.temperature))
    if spec.top_k:
        warpers.append(TopKLogitsWarper(spec.top_k))
    if spec.top_p < 1.0:
        warpers.append(TopPLogitsWarper(spec.top_p))
    return warpers


def _generator(seed: int, key: str, device: torch.device) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
