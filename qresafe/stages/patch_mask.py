"""Algorithm 1's re-masking over a training engine: score on all ranks, sum, mask the top tau."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qresafe.core.masked_lora import MaskedLoraLinear
from qresafe.core.masks import LazyScores, magnitude_scores, random_scores
from qresafe.core.remask import RemaskReport, remask
from qresafe.core.set_difference import set_difference
from qresafe.core.snip import SnipScorer
from qresafe.hf.answer_head import AnswerHead
from qresafe.specs import MaskSpec, PatchSpec
from qresafe.stages.patch_data import Batch, Pool, Row, collate, share
from qresafe.stages.patch_loss import answer_logps, term_losses
from qresafe.stages.train_engine import TrainEngine

Layers = Mapping[str, MaskedLoraLinear]


@dataclass(frozen=True)
class MaskRows:
    """What SNIP scores; the same rows at every re-masking.

    Attributes:
        safety: Of the pool's refusals; empty where the mask asks no gradient.
        utility: Benign rows, for `mask.score: set_difference` alone.
    """

    safety: Sequence[Row] = ()
    utility: Sequence[Row] = ()


def mask_rows(pool: Pool, spec: PatchSpec) -> MaskRows:
    """Return what the mask's score is computed on.

    Raises:
        DataError: The pool lacks such rows.
    """
    mask = spec.mask
    if mask.score not in ("snip", "set_difference"):
        return MaskRows()
    utility = pool.utility_rows(mask, spec.seed) if mask.score == "set_difference" else ()
    return MaskRows(pool.mask_rows(mask, spec.seed), utility)


def renew_masks(
    engine: TrainEngine,
    model: Any,
    head: AnswerHead,
    layers: Layers,
    rows: MaskRows,
    spec: PatchSpec,
    version: int,
) -> RemaskReport:
    """Score the current weights and give every layer its new masks; the same on every rank.

    Args:
        engine: Sums the scores over the ranks.
        model: Q0 with patched layers, not wrapped by the engine.
        head: Of `model`.
        layers: Name -> patched layer.
        rows: What SNIP scores.
        spec: The mask's part, beta and the micro-batch size.
        version: Number of the new mask, from 1.
    """
    scores = _scores(engine, model, head, layers, rows, spec)
    trained = [parameter for layer in layers.values() for parameter in layer.trained.values()]
    with engine.gathered(trained):
        return remask(layers, scores, tau=spec.mask.tau, scope=spec.mask.scope, version=version)


def snip_scores(
    engine: TrainEngine,
    model: Any,
    head: AnswerHead,
    layers: Layers,
    rows: Sequence[Row],
    spec: PatchSpec,
) -> Mapping[str, Tensor]:
    """Return SNIP scores (paper Eq. 3) averaged over `rows`, equal on every rank.

    Each rank runs its share of the rows forward and backward; scores are then summed layer by
    layer, so that no more than one layer's scores are held besides the scorer's own sums.
    """
    loss = _sample_loss(spec.mask, spec.objective.beta)
    answers = 2 if spec.mask.loss == "dpo" else 1  # one loss compares both, so both are one sample
    with SnipScorer(layers, rows_per_sample=answers) as scorer:
        for batch, live in _micro_batches(rows, engine, spec.micro_batch_size):
            scorer.batch(len(batch.ids), batch.positions // batch.ids.shape[1])
            logits = head.logits(model, batch.ids, batch.positions)
            (loss(logits, batch) * live).backward()
    scores = scorer.scores()
    for name, layer in layers.items():
        with engine.gathered(layer.parameters(recurse=False)):
            mine = scores[name]
        scores[name] = engine.all_reduce(mine / len(rows))
    return scores


def _scores(
    engine: TrainEngine,
    model: Any,
    head: AnswerHead,
    layers: Layers,
    rows: MaskRows,
    spec: PatchSpec,
) -> Mapping[str, Tensor]:
    if spec.mask.score == "snip":
        return snip_scores(engine, model, head, layers, rows.safety, spec)
    if spec.mask.score == "set_difference":
        safety = snip_scores(engine, model, head, layers, rows.safety, spec)
        answers = spec.mask.model_copy(update={"loss": "nll"})  # benign rows have no pair
        plain = spec.model_copy(update={"mask": answers})
        utility = snip_scores(engine, model, head, layers, rows.utility, plain)
        return set_difference(safety, utility, spec.mask.utility_tau)
    if spec.mask.score == "magnitude":
        return magnitude_scores({n: _weight(engine, layer) for n, layer in layers.items()})
    shapes = {name: layer.shape for name, layer in layers.items()}
    return _on_device(random_scores(shapes, spec.seed), engine.device)


def _weight(engine: TrainEngine, layer: MaskedLoraLinear) -> Callable[[], Tensor]:
    def weight() -> Tensor:
        with engine.gathered(layer.parameters(recurse=False)), torch.no_grad():
            return layer.effective_weight()

    return weight


def _on_device(scores: Mapping[str, Tensor], device: torch.device) -> LazyScores:
    def maker(name: str) -> Callable[[], Tensor]:
        return lambda: scores[name].to(device)

    return LazyScores({name: maker(name) for name in scores})


def _sample_loss(mask: MaskSpec, beta: float) -> Callable[[Tensor, Batch], Tensor]:
    if mask.loss == "dpo":
        return lambda logits, batch: term_losses(logits, batch, beta)["dpo"].sum()
    return lambda logits, batch: -answer_logps(logits, batch).sum()


def _micro_batches(
    rows: Sequence[Row], engine: TrainEngine, micro: int
) -> list[tuple[Batch, float]]:
    """Return this rank's batches and whether each counts: ranks need equally many."""
    lengths = np.array([len(row.prompt) + len(row.chosen) for row in rows])
    shares = share(
        range(len(rows)), lengths, rank=engine.rank, world_size=engine.world_size, micro=micro
    )
    return [
        (collate([rows[i] for i in part or [0]], 1).to(engine.device), float(bool(part)))
        for part in shares
    ]
