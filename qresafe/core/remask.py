"""Algorithm 1, the re-mask line: scores -> top tau -> masks on the layers, every K steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from qresafe.core.masked_lora import FactorMaskedLinear, MaskedLoraLinear, Masks
from qresafe.core.masks import factor_masks, iter_top_fraction


@dataclass(frozen=True)
class RemaskReport:
    """What a re-mask did.

    Args:
        version: Number of the mask, 1 for the first.
        overlap: |old and new| / max(|old|, |new|) over the masks of all layers, 0 to 1.
        active: Layer name -> entries that may move now (weights, or columns and rows).
        total: Layer name -> entries of its masks.
    """

    version: int
    overlap: float
    active: dict[str, int]
    total: dict[str, int]


def remask(
    layers: Mapping[str, MaskedLoraLinear],
    scores: Mapping[str, Tensor],
    *,
    tau: float,
    scope: Literal["global", "layer"] = "global",
    version: int = 1,
) -> RemaskReport:
    """Set every layer's masks to the top `tau` of `scores`, holding one layer at a time.

    Under ZeRO-3 gather the layers' A and B first, and do it on every rank with equal scores.

    Args:
        layers: Name -> patched layer, all of one kind.
        scores: Name -> (out, in) scores >= 0 of the same layers.
        tau: Fraction that may move.
        scope: One threshold over all layers or one per layer. Factor masks are always per layer.
        version: Number of the new mask, for the report.

    Raises:
        ModelError: A score is not finite or negative.
    """
    by_factors = any(isinstance(layer, FactorMaskedLinear) for layer in layers.values())
    masks_of = _factor_masks(scores, tau) if by_factors else _weight_masks(scores, tau, scope)
    active: dict[str, int] = {}
    total: dict[str, int] = {}
    before = shared = 0
    for name, masks in masks_of:
        active[name] = sum(int(mask.sum()) for mask in masks)
        total[name] = sum(mask.numel() for mask in masks)
        for old, new in zip(layers[name].masks, masks, strict=True):
            before += int(old.sum())
            shared += int((old & new.to(old.device)).sum())
        layers[name].set_masks(masks)
    larger = max(before, sum(active.values()))
    return RemaskReport(version, shared / larger if larger else 1.0, active, total)


def _weight_masks(
    scores: Mapping[str, Tensor], tau: float, scope: Literal["global", "layer"]
) -> Iterator[tuple[str, Masks]]:
    for name, mask in iter_top_fraction(scores, tau, scope):
        yield name, (mask,)


def _factor_masks(scores: Mapping[str, Tensor], tau: float) -> Iterator[tuple[str, Masks]]:
    for name in scores:
        yield name, factor_masks(scores[name], tau)
