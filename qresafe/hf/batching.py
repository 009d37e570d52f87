"""Token sequences of unequal length to rectangular batches, in an order that is planned ahead."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def left_pad(sequences: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Pad at the left, so that every sequence ends in the last column (for generation).

    Args:
        sequences: Token ids, one sequence per row; at least one row.
        pad: The id to fill with.

    Returns:
        ids (rows, longest) int64 and the attention mask of the same shape, 1 where a token is.
    """
    ids, mask = _blank(sequences, pad)
    for row, sequence in enumerate(sequences):
        start = ids.shape[1] - len(sequence)
        ids[row, start:] = torch.as_tensor(sequence, dtype=torch.long)
        mask[row, start:] = 1
    return ids, mask


def right_pad(sequences: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Pad at the right, so that every sequence starts in column 0 (for training and scoring).

    Args:
        sequences: Token ids, one sequence per row; at least one row.
        pad: The id to fill with.

    Returns:
        ids (rows, longest) int64 and the attention mask of the same shape, 1 where a token is.
    """
    ids, mask = _blank(sequences, pad)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.as_tensor(sequence, dtype=torch.long)
        mask[row, : len(sequence)] = 1
    return ids, mask


def length_plan(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Group rows of similar length, always in the same way for the same lengths.

    Rows are sorted by length, ties by index, and cut into runs of `batch_size`: a job that is
    resumed or spread differently therefore computes the same batches.

    Args:
        lengths: Tokens in each row.
        batch_size: Rows per batch, >= 1; the last batch may be smaller.

    Returns:
        Batches of row indices; every index exactly once.
    """
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _blank(sequences: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    shape = (len(sequences), max(map(len, sequences)))
    return torch.full(shape, pad, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
