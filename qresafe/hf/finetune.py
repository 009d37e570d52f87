"""Fine-tuning a causal LM on chats: one plain loop for the embedded model, QAT and its control."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qresafe.errors import DataError, DivergedError
from qresafe.hf.batching import length_plan, right_pad
from qresafe.hf.half import scale_gradients
from qresafe.progress import Progress, Silent

Chat = tuple[list[int], list[int]]  # prompt ids, answer ids (with the end token)
Loss = Literal["cross_entropy", "self_distill"]
Optimizer = Literal["adamw", "adamw8bit"]
BatchLoss = Callable[[list[Chat]], Tensor]
ExtraLoss = Callable[[Any], Tensor]  # of the model as it is at a step

_BUCKET = 16  # batches that are sorted by length together: little padding, still well shuffled


def finetune(
    model: Any,
    chats: Sequence[Chat],
    *,
    parameters: Iterable[nn.Parameter],
    steps: int,
    batch_size: int,
    lr: float,
    loss: Loss = "cross_entropy",
    teacher: Any | None = None,
    extra: ExtraLoss | None = None,
    warmup_steps: int = 5,
    optimizer: Optimizer = "adamw",
    weight_decay: float = 0.0,
    adam_betas: tuple[float, float] = (0.9, 0.98),
    adam_eps: float = 1e-8,
    max_grad_norm: float = 1.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[float]:
    """Train `parameters` of `model` on the answers of `chats`, in place.

    AdamW; the rate rises linearly over `warmup_steps` and falls to 0 along a half cosine. All
    randomness (the order of chats) comes from `seed`, so the same call on the same machine gives
    the same bits.

    Args:
        model: Any HF causal LM; left in the train/eval mode that it came in.
        chats: (prompt ids, answer ids) pairs; the loss is taken on answer tokens only.
        parameters: What the optimizer moves; everything else is left as it is.
        steps: Optimizer steps; passes over the chats are repeated as needed.
        batch_size: Chats per step; the last batch of a pass may be smaller.
        lr: Peak learning rate.
        loss: "cross_entropy" against the tokens, or "self_distill": against the full next-token
            distribution of `teacher` at the same positions.
        teacher: The model to distil from; needed by "self_distill" only.
        extra: Called once a step; what it returns is added to the loss.
        warmup_steps: Steps of the linear rise.
        optimizer: "adamw", or "adamw8bit" whose moments are of 8 bits: bitsandbytes'.
        weight_decay: AdamW's decoupled decay.
        adam_betas: AdamW's momentum factors.
        adam_eps: AdamW's epsilon; 1e-8 lets self-distillation drift on float noise.
        max_grad_norm: The global gradient norm is clipped to this.
        seed: Of the order of chats.
        progress: Is advanced by one each step, with the loss as its note.

    Returns:
        The loss of each step, in nats per answer token, `extra` included.

    Raises:
        DataError: There are no chats, or a chat has an empty prompt or answer.
        DivergedError: The loss is not finite.
    """
    _check(chats)
    trained = list(parameters)
    scale = scale_gradients(model, trained)
    batch_loss = _batch_loss(model, loss, teacher)
    descent = _adamw(optimizer)(
        trained, lr=lr, betas=adam_betas, eps=adam_eps, weight_decay=weight_decay
    )
    rate = partial(warmup_cosine, steps=steps, warmup_steps=warmup_steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(descent, rate)
    shown = progress or Silent()
    batches = epoch_batches([len(p) + len(a) for p, a in chats], batch_size, seed)
    was_training = model.training
    model.train()
    history: list[float] = []
    for _ in range(steps):
        value = batch_loss([chats[index] for index in next(batches)])
        if extra is not None:
            value = value + extra(model)
        descent.zero_grad(set_to_none=True)
        (value * scale).backward()
        torch.nn.utils.clip_grad_norm_(trained, max_grad_norm)
        descent.step()
        schedule.step()
        history.append(value.item())
        _require_finite(history)
        shown.advance(note=f"loss {history[-1]:.3f}")
    model.train(was_training)
    return history


def _require_finite(history: Sequence[float]) -> None:
    if not math.isfinite(history[-1]):
        what = f"the fine-tuning's loss is {history[-1]} at step {len(history)}"
        raise DivergedError(what, remedy="lower its learning rate (lr)")


def _adamw(name: Optimizer) -> Any:
    if name == "adamw":
        return torch.optim.AdamW
    from bitsandbytes.optim.adamw import AdamW8bit

    return AdamW8bit


def total_steps(steps: int, epochs: float | None, chats: int, batch_size: int) -> int:
    """Return the optimizer steps that a spec asks for: `epochs` passes, or else `steps`.

    A pass takes ceil(chats / batch_size) steps, because its last batch may be smaller.
    """
    if epochs is None:
        return steps
    return max(1, round(epochs * math.ceil(chats / batch_size)))


def warmup_cosine(step: int, steps: int, warmup_steps: int) -> float:
    """Return the factor on the peak rate at `step` (0-based): linear rise times half a cosine."""
    rise = min(1.0, (step + 1) / max(1, warmup_steps))
    return rise * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """Yield batches of row indices without end: each pass holds every row once, shuffled.

    Rows are shuffled, then sorted by length within buckets of a few batches, so that padding is
    small; the order of the batches is shuffled again.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        batches: list[list[int]] = []
        for start in range(0, len(order), batch_size * _BUCKET):
            bucket = order[start : start + batch_size * _BUCKET]
            plan = length_plan([lengths[index] for index in bucket], batch_size)
            batches += [[bucket[position] for position in batch] for batch in plan]
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index]


def answer_logits(model: Any, batch: Sequence[Chat]) -> tuple[Tensor, Tensor]:
    """Return the logits that predict the answer tokens of a batch, and those tokens.

    Sequences are padded at the right and attend causally, so padding needs no mask. Where the
    model takes `logits_to_keep`, its head runs on columns that predict some answer token only.

    Returns:
        logits (answer tokens of the batch, vocabulary) and token ids (answer tokens,).
    """
    device = next(model.parameters()).device
    ids, mask = right_pad([prompt + answer for prompt, answer in batch], pad=0)
    starts = torch.tensor([len(prompt) for prompt, _ in batch])[:, None]
    labelled = (mask[:, 1:] == 1) & (torch.arange(1, ids.shape[1]) >= starts)
    columns = labelled.any(dim=0).nonzero().squeeze(1)
    keep = {"logits_to_keep": columns.to(device)} if _takes_columns(model) else {}
    logits = model(input_ids=ids.to(device), use_cache=False, **keep).logits
    if not keep:
        logits = logits[:, columns.to(device)]
    chosen = labelled[:, columns]
    return logits[chosen.to(device)], ids[:, 1:][:, columns][chosen].to(device)


def _batch_loss(model: Any, loss: Loss, teacher: Any | None) -> BatchLoss:
    if loss == "self_distill" and teacher is None:
        raise TypeError("self_distill needs a teacher")

    def cross_entropy(batch: list[Chat]) -> Tensor:
        logits, targets = answer_logits(model, batch)
        return nn.functional.cross_entropy(logits.float(), targets)

    def self_distill(batch: list[Chat]) -> Tensor:
        with torch.no_grad():
            target = answer_logits(teacher, batch)[0].float().softmax(-1)
        return nn.functional.cross_entropy(answer_logits(model, batch)[0].float(), target)

    return self_distill if loss == "self_distill" else cross_entropy


def _takes_columns(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _check(chats: Sequence[Chat]) -> None:
    if not chats:
        raise DataError("no chats to fine-tune on", remedy="give at least one calibration chat")
    for index, (prompt, answer) in enumerate(chats):
        if not prompt or not answer:
            raise DataError(f"chat {index} has an empty prompt or answer", remedy="remove it")
