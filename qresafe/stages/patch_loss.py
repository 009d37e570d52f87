"""What each term of the objective says of a micro-batch, row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from qresafe.core.objectives import dpo_loss, kl_loss

if TYPE_CHECKING:  # so that a bare GPU machine needs no pyarrow (bench/gpu.py)
    from qresafe.stages.patch_data import Batch


def term_losses(logits: Tensor, batch: Batch, beta: float) -> dict[str, Tensor]:
    """Return each term's loss of every row that it applies to.

    Args:
        logits: (N, vocabulary) at `batch.positions`.
        batch: The rows.
        beta: Of the DPO loss.

    Returns:
        term -> (rows of the term,), nats: "nll" and "anchor" are means over answer tokens, "kl"
        over the tokens with a teacher distribution; terms without rows are left out.
    """
    found: dict[str, Tensor] = {}
    whole = batch.terms["dpo"], batch.terms["nll"], batch.terms["anchor"]
    if any(len(rows) for rows in whole):
        logps = answer_logps(logits, batch)
        means = -logps / batch.answer_tokens
        if len(batch.terms["dpo"]):
            chosen, rejected = logps[batch.terms["dpo"]], logps[batch.rejected]
            ref_chosen, ref_rejected = batch.reference.unbind(1)
            found["dpo"] = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)
        for name in ("nll", "anchor"):
            if len(batch.terms[name]):
                found[name] = means[batch.terms[name]]
    if len(batch.terms["kl"]):
        found["kl"] = _kl(logits, batch)
    return found


def answer_logps(logits: Tensor, batch: Batch) -> Tensor:
    """Return log p(y | x) of every sequence, (S,) float32, nats."""
    tokens = -F.cross_entropy(logits.float(), batch.targets, reduction="none")
    sums = tokens.new_zeros(len(batch.answer_tokens))
    return sums.index_add(0, batch.sequence, tokens)


def _kl(logits: Tensor, batch: Batch) -> Tensor:
    per_token = kl_loss(
        logits[batch.kl_tokens][:, None],
        batch.teacher_ids[:, None],
        batch.teacher_logps[:, None],
    )
    rows = len(batch.terms["kl"])
    counts = torch.bincount(batch.kl_rows, minlength=rows)
    return per_token.new_zeros(rows).index_add(0, batch.kl_rows, per_token) / counts
