"""From scores to masks: M_Q is 1 for the top-tau fraction (paper Eq. 3).

The global threshold is found in two passes of histograms over the bits of the scores, so it is
exact, and no more than one layer's scores are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from qresafe.core.blocks import keyed_generator
from qresafe.errors import ModelError

_BINS = 1 << 16
_CHUNK = 1 << 22  # scores counted at a time: bounds the temporary


class HistogramQuantile:
    """The k-th largest of a stream of non-negative float32 scores, in two passes.

    Non-negative floats are ordered like their bit patterns. The first pass counts the upper 16
    bits, the second the lower 16 bits of the scores in the bin where the rank falls: the result
    is exact, whatever the distribution. Two histograms of 64 Ki counts are all that is held.

    Args:
        rank: k >= 1.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.counts = torch.zeros(_BINS, dtype=torch.int64)
        self.bin: int | None = None  # the first pass's result

    def add(self, scores: Tensor) -> None:
        """Count a tensor of scores >= 0 of any shape."""
        for chunk in scores.detach().float().reshape(-1).split(_CHUNK):
            bits = chunk.view(torch.int32)
            upper = bits >> 16
            counted = upper if self.bin is None else bits[upper == self.bin] & (_BINS - 1)
            self.counts += torch.bincount(counted, minlength=_BINS).cpu()

    def refine(self) -> None:
        """End the first pass; add every score once more before asking for `threshold`."""
        self.bin, self.rank = self._locate()
        self.counts.zero_()

    def threshold(self) -> tuple[float, int]:
        """Return the k-th largest score, and how many scores equal to it are among the top k."""
        if self.bin is None:
            raise RuntimeError("refine() and a second pass come before threshold()")
        lower, ties = self._locate()
        pattern = torch.tensor((self.bin << 16) | lower, dtype=torch.int32)
        return float(pattern.view(torch.float32)), ties

    def _locate(self) -> tuple[int, int]:
        """Return the bin that holds the rank-th largest, and the rank that is left within it."""
        above = self.counts.flip(0).cumsum(0).flip(0)
        index = int((above >= self.rank).nonzero()[-1])
        higher = int(above[index]) - int(self.counts[index])
        return index, self.rank - higher


@dataclass
class Cut:
    """Keeps scores above `value`, and the first `ties` that equal it; carries `ties` along."""

    value: float
    ties: int

    def mask(self, scores: Tensor) -> Tensor:
        """Return the bool mask of the next tensor of the stream."""
        scores = scores.float()
        keep = scores > self.value
        equal = scores == self.value
        count = int(equal.sum())
        if count <= self.ties:
            self.ties -= count
            return keep | equal
        if self.ties:
            first = equal.flatten().nonzero()[: self.ties, 0]
            keep.view(-1)[first] = True
            self.ties = 0
        return keep


def top_fraction(
    scores: Mapping[str, Tensor], tau: float, scope: Literal["global", "layer"] = "global"
) -> dict[str, Tensor]:
    """Return the bool masks of exactly the round(tau * n) largest scores.

    Args:
        scores: Layer name -> scores >= 0; read one layer at a time, twice.
        tau: Fraction to keep, 0 to 1.
        scope: One threshold over all layers, or one per layer.

    Raises:
        ModelError: A score is not finite, or negative.
    """
    return dict(iter_top_fraction(scores, tau, scope))


def iter_top_fraction(
    scores: Mapping[str, Tensor], tau: float, scope: Literal["global", "layer"] = "global"
) -> Iterator[tuple[str, Tensor]]:
    """Yield what `top_fraction` returns, layer by layer, holding one mask at a time."""
    if scope == "layer":
        for name in scores:
            one = {name: scores[name]}
            yield name, _cut(one, tau).mask(one[name])
        return
    cut = _cut(scores, tau)
    for name in scores:
        yield name, cut.mask(scores[name])


def iter_top_count(scores: Mapping[str, Tensor], count: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the bool masks of exactly the `count` largest scores, layer by layer.

    Args:
        scores: Layer name -> scores >= 0; read one layer at a time, four times.
        count: At most the number of scores.
    """
    for name in scores:
        _checked(name, scores[name])
    cut = _cut_at(scores, count)
    for name in scores:
        yield name, cut.mask(scores[name])


def _cut(scores: Mapping[str, Tensor], tau: float) -> Cut:
    total = sum(_checked(name, scores[name]).numel() for name in scores)
    return _cut_at(scores, round(tau * total))


def _cut_at(scores: Mapping[str, Tensor], rank: int) -> Cut:
    if rank == 0:
        return Cut(torch.inf, 0)
    quantile = HistogramQuantile(rank)
    for name in scores:
        quantile.add(scores[name])
    quantile.refine()
    for name in scores:
        quantile.add(scores[name])
    return Cut(*quantile.threshold())


def _checked(name: str, scores: Tensor) -> Tensor:
    low, high = torch.aminmax(scores)
    if not (low >= 0 and high < torch.inf):
        remedy = "check the model and the calibration pairs for overflow, or use float32"
        raise ModelError(f"scores from {low} to {high}", where=f"layer {name!r}", remedy=remedy)
    return scores


def factor_masks(scores: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Return the masks over A's input columns and B's output rows: MapMask of Algorithm 1.

    The paper leaves MapMask open. Scoring the factors themselves is degenerate, since B = 0 at
    the start makes all their scores 0, so weight scores are summed over each input column and
    each output row, and the top tau of both are kept.

    Args:
        scores: (out, in) weight scores >= 0.
        tau: Fraction of columns, and of rows, to keep.

    Returns:
        bool (in,) and bool (out,).
    """
    columns, rows = scores.sum(0), scores.sum(1)
    by_name = {"columns": columns, "rows": rows}
    masks = top_fraction(by_name, tau, scope="layer")
    return masks["columns"], masks["rows"]


class LazyScores(Mapping[str, Tensor]):
    """Scores that are made when read, so that one layer is held at a time."""

    def __init__(self, make: Mapping[str, Callable[[], Tensor]]) -> None:
        self._make = make

    def __getitem__(self, name: str) -> Tensor:
        return self._make[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._make)

    def __len__(self) -> int:
        return len(self._make)


def random_scores(shapes: Mapping[str, torch.Size], seed: int) -> LazyScores:
    """Return uniform scores that depend on `seed` and the layer's name alone (a control)."""

    def maker(name: str) -> Callable[[], Tensor]:
        return lambda: torch.rand(shapes[name], generator=keyed_generator(seed, name))

    return LazyScores({name: maker(name) for name in shapes})


def magnitude_scores(weights: Mapping[str, Callable[[], Tensor]]) -> LazyScores:
    """Return |W| as scores (a control); `weights` gives each layer's weight when called."""

    def maker(name: str) -> Callable[[], Tensor]:
        return lambda: weights[name]().detach().abs()

    return LazyScores({name: maker(name) for name in weights})


def pack_rows(mask: Tensor) -> Tensor:
    """Return a bool mask (rows, columns) as uint8 (rows, ceil(columns / 8)), on its device.

    As `pack_bits`, but every row begins a byte, so that blocks of rows can be unpacked alone.
    """
    padded = F.pad(mask, (0, -mask.shape[1] % 8)).unflatten(1, (-1, 8)).to(torch.uint8)
    bits = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded << bits).sum(-1, dtype=torch.uint8)


def unpack_rows(packed: Tensor, columns: int) -> Tensor:
    """Return the bool mask (rows, columns) that `pack_rows` packed.

    A byte's eight entries are looked up as one int64: a fifth of the time of shifting bits.
    """
    eights = _eights(packed.device).gather(0, packed.long().flatten())
    return eights.view(torch.bool).view(len(packed), -1)[:, :columns]


@cache
def _eights(device: torch.device) -> Tensor:
    """Return for every byte its bits, the lowest first, as eight bool side by side in an int64."""
    bits = torch.arange(256, dtype=torch.uint8)[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.contiguous().view(torch.int64).view(-1).to(device)


def pack_bits(mask: Tensor) -> Tensor:
    """Return a bool mask as uint8, 8 entries a byte (first entry in the lowest bit)."""
    packed = np.packbits(mask.cpu().numpy().reshape(-1), bitorder="little")
    return torch.from_numpy(packed)


def unpack_bits(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the bool mask of `shape` that `pack_bits` packed."""
    flat = np.unpackbits(packed.cpu().numpy(), count=int(np.prod(shape)), bitorder="little")
    return torch.from_numpy(flat.astype(np.bool_)).view(shape)
