"""Additive codebooks (AQLM): one code of each of M codebooks stands for `group` weights together.

w[row, group] = scale[row] * sum over m of codebook[m][code[row, group, m]]  (Egiazarian et al.
2024, arXiv 2401.06118). Codes are stored as the `aqlm` package stores them: signed integers in
which an index of 2^(bits-1) or more is wrapped to a negative number.

A code moves all weights of its group at once. So a mask over single weights holds for groups
only: a group moves if any of its weights has a change other than 0, and then the weights beside
it, masked or not, move too; groups without any change keep their codes exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# Hypotheses per group, and sweeps over its codebooks: from present codes, where a second sweep was
# measured to bring nothing, and from nothing, unless every pair of two codebooks is tried.
MOVE_BEAM, MOVE_SWEEPS = 4, 1
ENCODE_BEAM, ENCODE_SWEEPS = 16, 2
HASH = 0x5851F42D4C957F2D  # a multiplier that spreads codes over 64 bits
# Scores (group, hypothesis, code) that are held at a time: on a GPU so many that it is busy, on a
# CPU what stays in its cache.
CHUNK, CPU_CHUNK = 1 << 24, 1 << 20


@dataclass(frozen=True)
class AdditiveGrid:
    """Sums of codebook vectors times a scale per output row.

    `encode` finds the nearest point for one codebook, and for two of at most 256 vectors; with
    more, the best of a beam search. `move` starts from the present codes and never ends farther
    from its target than they are.

    Args:
        codebooks: (M, 2^bits, group) vectors.
        scales: (out, 1), none of them 0.
        bits: Width of a code, 1 to 16.
        shape: (out, in) of the weight; `in` is a multiple of the group.
    """

    codebooks: Tensor
    scales: Tensor
    bits: int
    shape: tuple[int, int]

    @property
    def group_size(self) -> int:
        """Weights that one code stands for."""
        return int(self.codebooks.shape[2])

    @property
    def code_shape(self) -> tuple[int, ...]:
        """(out, in / group, M)."""
        return self.shape[0], self.shape[1] // self.group_size, len(self.codebooks)

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @property
    def row_step(self) -> int:
        return 1

    @property
    def dtype(self) -> torch.dtype:
        return self.codebooks.dtype

    def rows(self, block: slice) -> AdditiveGrid:
        """Return the grid of a block of rows."""
        height = len(range(*block.indices(self.shape[0])))
        return replace(self, scales=self.scales[block], shape=(height, self.shape[1]))

    def decode(self, codes: Tensor) -> Tensor:
        """Return the weights (out, in) that codes (out, in / group, M) stand for."""
        sums = decode_groups(self.codebooks, self._indices(codes).flatten(0, 1))
        weight = sums.view(self.shape[0], -1, self.group_size) * self.scales[:, :, None]
        return weight.view(self.shape)

    def encode(self, weight: Tensor) -> Tensor:
        """Return the codes of grid points near `weight`; see the class for how near."""
        targets, books = self._targets(weight), self.codebooks.float()
        start = residual_codes(targets, books)
        if len(books) == 2 and books.shape[1] <= 256:  # every pair
            return self._stored(search(targets, start, books, books.shape[1], sweeps=1))
        return self._stored(search(targets, start, books, ENCODE_BEAM, ENCODE_SWEEPS))

    def snap(self, weight: Tensor) -> Tensor:
        """Return grid points near `weight`, in its dtype."""
        return self.decode(self.encode(weight)).to(weight.dtype)

    def move(self, codes: Tensor, delta: Tensor) -> Tensor:
        """Return codes near decode(codes) + delta; exactly `codes` in groups where delta is 0."""
        moved, touched, found = self._moved(codes, delta)
        moved[touched] = found
        return self._stored(moved)

    def snap_moved_(self, codes: Tensor, delta: Tensor) -> Tensor:
        """Overwrite float32 `delta` with decode(move(codes, delta)), and return it."""
        moved, touched, found = self._moved(codes, delta)
        moved[touched] = found
        return delta.copy_(self.decode(self._stored(moved)))

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> AdditiveGrid:
        """Return the grid on `device`, its codebooks and scales in `dtype`."""
        books, scales = (t.to(device=device, dtype=dtype) for t in (self.codebooks, self.scales))
        return replace(self, codebooks=books, scales=scales)

    def _moved(self, codes: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return flat indices (groups, M), which groups are touched, and their new indices."""
        indices = self._indices(codes).flatten(0, 1)
        touched = (delta.reshape(-1, self.group_size) != 0).any(1)
        books, old = self.codebooks.float(), indices[touched]
        targets = decode_groups(books, old) + self._targets(delta)[touched]
        return indices, touched, search(targets, old, books, MOVE_BEAM, MOVE_SWEEPS)

    def _targets(self, weight: Tensor) -> Tensor:
        """Return float32 weight / scale as groups, (out * in / group, group)."""
        return (weight.float() / self.scales.float()).reshape(-1, self.group_size)

    def _indices(self, codes: Tensor) -> Tensor:
        return codes.long() & ((1 << self.bits) - 1)

    def _stored(self, indices: Tensor) -> Tensor:
        return wrapped(indices, self.bits).view(self.code_shape)


def wrapped(indices: Tensor, bits: int) -> Tensor:
    """Return indices in [0, 2^bits) as the signed integers that are stored: int8 or int16."""
    signed = torch.where(indices >= 1 << (bits - 1), indices - (1 << bits), indices)
    return signed.to(torch.int8 if bits <= 8 else torch.int16)


def decode_groups(codebooks: Tensor, indices: Tensor) -> Tensor:
    """Return the sums (n, group) of the vectors that indices (n, M) name; differentiable."""
    total = codebooks[0][indices[:, 0]]
    for book, column in zip(codebooks[1:], indices.T[1:], strict=True):
        total = total + book[column]
    return total


def residual_codes(targets: Tensor, codebooks: Tensor) -> Tensor:
    """Return indices (n, M) chosen one codebook after the other, each nearest to what is left."""
    found = targets.new_zeros(len(targets), len(codebooks), dtype=torch.long)
    for piece in _pieces(targets, codebooks.shape[1]):
        left = targets[piece]
        for m, book in enumerate(codebooks):
            found[piece, m] = (book.square().sum(1) - 2 * left @ book.T).argmin(1)
            left = left - book[found[piece, m]]
    return found


def search(targets: Tensor, start: Tensor, codebooks: Tensor, beam: int, sweeps: int) -> Tensor:
    """Return indices whose sums are near the targets, by beam search over the codebooks.

    Each step frees one codebook of every hypothesis and keeps the `beam` best of all that its
    vectors can make of them. Where nothing is strictly nearer than `start`, `start` stays.

    Args:
        targets: (n, group), float32.
        start: (n, M) indices.
        codebooks: (M, K, group), float32.
        beam: Hypotheses per target.
        sweeps: Over all codebooks; one is enough for a single codebook.
    """
    found = start.clone()
    steps = list(range(len(codebooks))) * (sweeps if len(codebooks) > 1 else 1)
    for piece in _pieces(targets, beam * codebooks.shape[1]):
        found[piece] = _search(targets[piece], start[piece], codebooks, beam, steps)
    return found


def _search(
    targets: Tensor, start: Tensor, codebooks: Tensor, beam: int, steps: list[int]
) -> Tensor:
    n, (books, vectors, group) = len(targets), codebooks.shape
    ones = codebooks.new_ones(books, vectors, 1)
    tables = torch.cat([-2 * codebooks, ones], 2).mT  # (M, group + 1, K)
    lengths = codebooks.square().sum(2)
    beams, sums = start[:, None], decode_groups(codebooks, start)[:, None]
    for step, m in enumerate(steps):
        others = sums - codebooks[m][beams[..., m]]
        left = targets[:, None] - others
        # Hypotheses that differ in m alone are the same one now: all but one of them are dropped.
        far = left.square().sum(2, keepdim=True).masked_fill_(repeated(beams, m), torch.inf)
        # |left - vector|^2, hypotheses by vectors, as one product
        scores = torch.addmm(lengths[m], torch.cat([left, far], 2).flatten(0, 1), tables[m])
        scores = scores.view(n, -1)
        wanted = 1 if step == len(steps) - 1 else min(beam, scores.shape[1])
        best = scores.topk(wanted, largest=False).indices
        parents, codes = (best // vectors)[..., None], best % vectors
        beams = beams.gather(1, parents.expand(-1, -1, books))
        beams[..., m] = codes
        sums = others.gather(1, parents.expand(-1, -1, group)) + codebooks[m][codes]
    found = beams[:, 0]
    nearer = _distance(targets, found, codebooks) < _distance(targets, start, codebooks)
    return torch.where(nearer[:, None], found, start)


def repeated(beams: Tensor, m: int) -> Tensor:
    """Say which hypotheses (n, beam, 1) equal an earlier one in all codebooks but `m`.

    They are told apart by a hash of 64 bits; should two ever collide, one is lost to the beam.
    """
    n, width, books = beams.shape
    if width == 1 or books == 1:
        return beams.new_zeros(n, width, 1, dtype=torch.bool)
    key = beams.new_zeros(n, width)
    for other in range(books):
        if other != m:
            key = key * HASH + beams[..., other]
    key, order = key.sort(dim=1, stable=True)
    again = torch.zeros_like(key, dtype=torch.bool)
    again[:, 1:] = key[:, 1:] == key[:, :-1]
    return torch.zeros_like(again).scatter_(1, order, again)[..., None]


def _distance(targets: Tensor, indices: Tensor, codebooks: Tensor) -> Tensor:
    return (targets - decode_groups(codebooks, indices)).square().sum(1)


def _pieces(targets: Tensor, scores: int) -> list[slice]:
    count = len(targets)
    height = max((CPU_CHUNK if targets.device.type == "cpu" else CHUNK) // scores, 1)
    return [slice(at, min(at + height, count)) for at in range(0, count, height)]
