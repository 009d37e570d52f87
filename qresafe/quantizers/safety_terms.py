"""Safety-in-mind fine-tuning: what LLM-QAT adds to its loss so that W's behaviour survives it.

Two terms, on calibration prompts that W answers once before the training. `dpo` prefers W's
refusals of harmful prompts to the answers that plain fine-tuning (the control arm) would give; its
reference is W, where the training starts. `anchor` is -log p of W's answers to benign and
borderline prompts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qresafe.core.objectives import dpo_loss, objective
from qresafe.embedded.calibration import safety_prompts
from qresafe.errors import DataError
from qresafe.hf.batching import length_plan
from qresafe.hf.chat import prompt_ids
from qresafe.hf.finetune import Chat, answer_logits, epoch_batches
from qresafe.hf.generate import Generated, generate_batch
from qresafe.hf.models import load_model, load_tokenizer
from qresafe.quantize_specs import SafetySpec
from qresafe.records import REFUSALS
from qresafe.registry import judges
from qresafe.specs import GenerateSpec

AT_A_TIME = 32  # rows that are answered or scored together


@dataclass(frozen=True)
class Preference:
    """W's refusal, the answer that plain fine-tuning gives, and log p of both under W, nats."""

    chosen: Chat
    rejected: Chat
    ref_chosen: float
    ref_rejected: float


@dataclass
class SafetyTerms:
    """The weighted terms, each on the next batch of its rows at every call of `loss`.

    Attributes:
        spec: Weights, beta, and rows per batch.
        preferences: Rows of `dpo`.
        anchors: Rows of `anchor`.
        seed: Of the order of rows.
        history: Each term's own value at every step, nats.
    """

    spec: SafetySpec
    preferences: Sequence[Preference]
    anchors: Sequence[Chat]
    seed: int
    history: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {
            "dpo": [_length(row.chosen) + _length(row.rejected) for row in self.preferences],
            "anchor": [_length(row) for row in self.anchors],
        }
        self._batches: dict[str, Iterator[list[int]]] = {
            name: epoch_batches(of, self.spec.batch_size, self.seed)
            for name, of in lengths.items()
            if of
        }

    def loss(self, model: Any) -> Tensor:
        """Return the weighted sum of the terms' means over the next batch of each."""
        losses = {}
        if "dpo" in self._batches:
            chosen = [self.preferences[index] for index in next(self._batches["dpo"])]
            losses["dpo"] = preference_losses(model, chosen, self.spec.beta)
        if "anchor" in self._batches:
            rows = [self.anchors[index] for index in next(self._batches["anchor"])]
            losses["anchor"] = -answer_logps(model, rows) / _answer_lengths(model, rows)
        weights = {"dpo": self.spec.dpo, "anchor": self.spec.anchor}
        total, means = objective(losses, weights, {name: len(of) for name, of in losses.items()})
        for name, mean in means.items():
            self.history.setdefault(name, []).append(mean)
        return total

    def counts(self) -> dict[str, Any]:
        """Return what the manifest says of the terms."""
        rows = {"preferences": len(self.preferences), "anchors": len(self.anchors)}
        return rows | {"losses": self.history}


def preference_losses(model: Any, rows: Sequence[Preference], beta: float) -> Tensor:
    """Return the DPO loss of each row, against W; see `dpo_loss`."""
    both = [row.chosen for row in rows] + [row.rejected for row in rows]
    chosen, rejected = answer_logps(model, both).chunk(2)
    references = torch.tensor([[row.ref_chosen, row.ref_rejected] for row in rows])
    ref_chosen, ref_rejected = references.to(chosen.device).unbind(1)
    return dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)


def answer_logps(model: Any, batch: Sequence[Chat]) -> Tensor:
    """Return log p(answer | prompt) of each chat, (chats,) float32, nats."""
    logits, targets = answer_logits(model, batch)
    tokens = -F.cross_entropy(logits.float(), targets, reduction="none")
    lengths = _answer_lengths(model, batch)
    row = torch.arange(len(batch), device=tokens.device).repeat_interleave(lengths)
    return tokens.new_zeros(len(batch)).index_add(0, row, tokens)


def safety_terms(source: Path, plain: Path, spec: SafetySpec, seed: int) -> SafetyTerms:
    """Let W and the plainly fine-tuned model answer, and return the terms.

    Args:
        source: W's folder.
        plain: The control's: the same fine-tuning without rounding and without these terms.
        spec: The terms.
        seed: Of the choice of prompts and of the order of rows.

    Raises:
        DataError: There are no prompts of a kind that a term needs, or `dpo` is the only term
            and no harmful prompt that W refuses is answered after plain fine-tuning.
    """
    prompts = safety_prompts(spec, seed)
    harmful = [text for kind, text in prompts if kind == "harmful"]
    others = [text for kind, text in prompts if kind != "harmful"]
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    model = load_model(source, dtype=torch.float32, device=device).requires_grad_(False)
    tokenizer = load_tokenizer(source)
    refusals = _answers(model, tokenizer, harmful, spec)
    anchors = [
        (prompt_ids(tokenizer, text), answer.ids)
        for text, answer in zip(others, _answers(model, tokenizer, others, spec), strict=True)
        if answer.text.strip()
    ]
    tuned = load_model(plain, dtype=torch.float32, device=device).requires_grad_(False)
    lapses = _answers(tuned, tokenizer, harmful, spec)
    del tuned
    flips = _flips(harmful, refusals, lapses, spec)
    pairs = [
        ((ids, chosen.ids), (ids, rejected.ids))
        for text, chosen, rejected in flips
        for ids in [prompt_ids(tokenizer, text)]
    ]
    return SafetyTerms(spec, _referenced(model, pairs), anchors, seed)


def _answers(model: Any, tokenizer: Any, texts: Sequence[str], spec: SafetySpec) -> list[Generated]:
    """Return greedy answers, in the order of the prompts."""
    prompts = [prompt_ids(tokenizer, text) for text in texts]
    greedy = GenerateSpec(max_new_tokens=spec.max_new_tokens)
    found: dict[int, Generated] = {}
    for batch in length_plan([len(prompt) for prompt in prompts], AT_A_TIME):
        keys = [texts[index] for index in batch]
        made = generate_batch(model, tokenizer, [prompts[i] for i in batch], keys, greedy)
        found |= zip(batch, made, strict=True)
    return [found[index] for index in range(len(texts))]


def _flips(
    texts: Sequence[str],
    refusals: Sequence[Generated],
    lapses: Sequence[Generated],
    spec: SafetySpec,
) -> list[tuple[str, Generated, Generated]]:
    """Return the prompts that W refuses and the plainly fine-tuned model answers, with both."""
    judge = judges.get(spec.judge)

    def refuses(text: str, answer: Generated) -> bool:
        return judge("harmful", text, answer.text).outcome in REFUSALS

    flips = [
        (text, chosen, rejected)
        for text, chosen, rejected in zip(texts, refusals, lapses, strict=True)
        if rejected.text.strip() and refuses(text, chosen) and not refuses(text, rejected)
    ]
    if texts and not flips:
        what = f"plain fine-tuning answers none of {len(texts)} harmful prompts that W refuses"
        if not spec.anchor:
            remedy = "give quantize.safety.anchor a weight, or other prompts"
            raise DataError(what, where="quantize.safety", remedy=remedy)
        warnings.warn(f"quantize.safety: {what}; its anchors are used alone", stacklevel=2)
    return flips


def _referenced(model: Any, pairs: Sequence[tuple[Chat, Chat]]) -> list[Preference]:
    """Return the pairs with log p of both answers under W."""
    rows: list[Preference] = []
    with torch.no_grad():
        for start in range(0, len(pairs), AT_A_TIME):
            batch = pairs[start : start + AT_A_TIME]
            logps = answer_logps(model, [c for c, _ in batch] + [r for _, r in batch]).tolist()
            scored = zip(batch, logps[: len(batch)], logps[len(batch) :], strict=True)
            rows += [Preference(c, r, ref_c, ref_r) for (c, r), ref_c, ref_r in scored]
    return rows


def _answer_lengths(model: Any, batch: Sequence[Chat]) -> Tensor:
    device = next(model.parameters()).device
    return torch.tensor([len(answer) for _, answer in batch], device=device)


def _length(chat: Chat) -> int:
    return len(chat[0]) + len(chat[1])
