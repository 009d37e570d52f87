"""The patch objective: a weighted sum of named terms over log-probabilities.

`dpo` is the paper's Eq. 1; `nll` and `anchor` are -log p of W's answers (to harmful prompts, and
to benign and borderline ones); `kl` is KL(W || Q) on the first tokens of W's answers. Every term
gives one loss per row, and each applies to its own rows of a mixed batch (DESIGN section 4,
point 7).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # a label that stands for no token, as in transformers


def token_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log p of every label, 0 where the label is -100.

    Args:
        logits: (rows, tokens, vocabulary); position t predicts labels[:, t + 1].
        labels: (rows, tokens) token ids, -100 for prompt and padding.

    Returns:
        (rows, tokens - 1), nats.
    """
    targets = labels[:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1),
        targets.flatten(),
        ignore_index=IGNORED,
        reduction="none",
    )
    return -losses.view(targets.shape)


def sequence_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log p(y|x) of every row, (rows,), nats: the sum of `token_logps`."""
    return token_logps(logits, labels).sum(1)


def dpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> Tensor:
    """Return -log sigmoid(beta ((chosen - ref_chosen) - (rejected - ref_rejected))), Eq. 1.

    Args:
        chosen: log pi_Q(y_w|x) per row, nats.
        rejected: log pi_Q(y_l|x) per row.
        ref_chosen: log pi_Q0(y_w|x) per row.
        ref_rejected: log pi_Q0(y_l|x) per row.
        beta: Strength of the pull towards Q0, > 0.

    Returns:
        One loss per row; ln 2 where Q = Q0.
    """
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return -F.logsigmoid(beta * margin)


def kl_loss(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_logps: Tensor,
    token_mask: Tensor | None = None,
) -> Tensor:
    """Return KL(W || Q) per row, averaged over tokens, from W's top-k log-probabilities.

    The tokens outside W's top k count as one lumped event: the coarse-grained KL, a lower bound
    of the full one, equal to it when the top k are the whole vocabulary.

    Args:
        student_logits: (rows, n, vocabulary), the logits that predict the n answer tokens.
        teacher_ids: (rows, n, k) token ids, distinct within a token.
        teacher_logps: (rows, n, k) log-probabilities under W, nats.
        token_mask: (rows, n) bool, False where the answer has already ended; None: all True.

    Returns:
        (rows,), nats, >= 0 up to rounding; 0 for a row without tokens.
    """
    student = F.log_softmax(student_logits.float(), dim=-1)
    teacher = teacher_logps.float()
    divergence = (teacher.exp() * (teacher - student.gather(-1, teacher_ids))).sum(-1)
    if teacher_ids.shape[-1] < student.shape[-1]:
        rest = (1 - teacher.exp().sum(-1)).clamp(min=0)
        student_rest = student.scatter(-1, teacher_ids, -torch.inf).logsumexp(-1)
        divergence = divergence + torch.xlogy(rest, rest) - rest * student_rest
    if token_mask is None:
        return divergence.mean(1)
    inside = torch.where(token_mask, divergence, 0.0)
    return inside.sum(1) / token_mask.sum(1).clamp(min=1)


def objective(
    losses: Mapping[str, Tensor], weights: Mapping[str, float], counts: Mapping[str, int]
) -> tuple[Tensor, dict[str, float]]:
    """Return the weighted sum of the terms' means, and each term's own mean.

    A mean is over the term's rows in the whole optimizer batch, so that the gradient does not
    depend on how it is cut into micro-batches and workers: their results add up.

    Args:
        losses: Term -> the losses of its rows in this micro-batch; at least one term.
        weights: Term -> weight >= 0.
        counts: Term -> its rows in the whole optimizer batch.
    """
    means = {name: loss.sum().float() / counts[name] for name, loss in losses.items()}
    total = torch.stack([weights[name] * mean for name, mean in means.items()]).sum()
    return total, {name: float(mean.detach()) for name, mean in means.items()}
