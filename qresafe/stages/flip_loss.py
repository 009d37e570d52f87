"""The loss of a discrete patch: the patch's terms, averaged within each kind of prompt.

L = sum over kinds k and terms t of weight(k) * weight(t) * mean of t over the rows of kind k.
Kinds are weighed apart because few flips repair many refusals: what costs is the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qresafe.errors import DataError
from qresafe.specs import FlipsSpec
from qresafe.stages.patch_data import Batch, Pool, batch_at, collate
from qresafe.stages.patch_loss import term_losses

PROBE, ROUNDS = 11, 12  # streams of random numbers


@dataclass(frozen=True)
class Piece:
    """Rows of one forward pass.

    Attributes:
        batch: The rows as tensors.
        shares: Term -> (kinds, rows of the term), what a row's loss counts in each kind's mean.
    """

    batch: Batch
    shares: dict[str, Tensor]

    def to(self, device: torch.device) -> Piece:
        """Return the piece with its tensors on `device`."""
        shares = {term: share.to(device) for term, share in self.shares.items()}
        return Piece(self.batch.to(device), shares)


class FlipLoss:
    """Which rows a round looks at, and what they weigh.

    How rows are cut into pieces does not depend on the number of workers, so that one worker and
    several compute the same numbers, and merely add them up in another order.

    Args:
        pool: All rows.
        spec: Kinds and sizes.
        micro: Rows per piece.
        seed: Of the draws.

    Raises:
        DataError: No row is of a kind with a weight.
    """

    def __init__(self, pool: Pool, spec: FlipsSpec, micro: int, seed: int) -> None:
        self.pool, self._spec, self._micro, self._seed = pool, spec, micro, seed
        self._kind_of = np.array(pool.table["kind"].to_pylist())
        weights = spec.kinds.model_dump()
        self.kinds = {
            kind: weight
            for kind, weight in weights.items()
            if weight > 0 and (self._kind_of == kind).any()
        }
        if not self.kinds:
            what = f"no pair is of a kind with a weight in patch.flips.kinds ({weights})"
            raise DataError(what, remedy="give the kinds that the pairs have a weight")

    def probe_rows(self) -> list[int]:
        """Return the rows on which the loss must fall; the same in every round."""
        return self._drawn(self._spec.probe_rows, PROBE, 0)

    def round_rows(self, number: int) -> list[int]:
        """Return the rows that round `number` takes its gradient on."""
        return self._drawn(self._spec.rows, ROUNDS, number)

    def pieces(self, indices: Sequence[int], rank: int, world_size: int) -> list[Piece]:
        """Return one rank's part of some rows: rows of similar length together."""
        ordered = sorted(indices, key=lambda index: (self.pool.lengths[index], index))
        cut = [ordered[at : at + self._micro] for at in range(0, len(ordered), self._micro)]
        counts = self._counts(indices)
        return [self._piece(part, counts) for part in cut[rank::world_size]]

    def means(self, logits: Tensor, piece: Piece) -> Tensor:
        """Return a piece's part of each kind's mean loss, (kinds,)."""
        found = term_losses(logits, piece.batch, self.pool.objective.beta)
        parts = [piece.shares[term] @ losses.float() for term, losses in found.items()]
        return torch.stack(parts).sum(0)

    def total(self, means: Tensor) -> Tensor:
        """Return the loss that the kinds' means, or parts of them, amount to."""
        return (means * torch.tensor(list(self.kinds.values())).to(means)).sum()

    def _drawn(self, count: int, stream: int, number: int) -> list[int]:
        found: list[int] = []
        for kind in self.kinds:
            places = np.flatnonzero(self._kind_of == kind)
            size = min(len(places), max(1, count // len(self.kinds)))
            chosen = batch_at(len(places), size, self._seed + stream, number)
            found += [int(place) for place in places[chosen]]
        return found

    def _counts(self, indices: Sequence[int]) -> dict[tuple[str, str], int]:
        """Return (term, kind) -> rows."""
        kinds = self._kind_of[list(indices)]
        return {
            (term, kind): int((eligible[list(indices)] & (kinds == kind)).sum())
            for term, eligible in self.pool.eligible.items()
            for kind in self.kinds
        }

    def _piece(self, indices: list[int], counts: dict[tuple[str, str], int]) -> Piece:
        batch = collate(self.pool.rows(indices), self.pool.objective.kl_tokens)
        kinds = self._kind_of[indices]
        shares: dict[str, Tensor] = {}
        for term, weight in self.pool.weights.items():
            of = kinds[batch.terms[term].numpy()]
            each = [
                weight / max(1, counts.get((term, kind), 0)) * (of == kind) for kind in self.kinds
            ]
            shares[term] = torch.tensor(np.array(each), dtype=torch.float32)
        return Piece(batch, shares)
