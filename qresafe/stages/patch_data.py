"""The rows that a patch learns from: which step sees which, and how they become tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from qresafe import records
from qresafe.errors import DataError
from qresafe.hf.batching import right_pad
from qresafe.specs import MaskSpec, ObjectiveSpec, PatchSpec

TERMS = ("dpo", "nll", "kl", "anchor")
ANCHOR_KINDS = ("benign", "borderline", "recombined")


@dataclass(frozen=True)
class Row:
    """One calibration prompt with what the objective needs of its answers.

    Attributes:
        prompt: Prompt token ids, with the opening of the assistant's turn.
        chosen: W's answer y_w, as many tokens of it as some term needs.
        rejected: Q0's answer y_l; empty where no term needs it.
        terms: The objective terms that apply to the row.
        reference: log pi_Q0 of chosen and of rejected, nats; (0, 0) where `dpo` does not apply.
        teacher_ids: (n, k) token ids of W's distribution on the first n tokens of `chosen`.
        teacher_logps: (n, k) their log-probabilities.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    terms: frozenset[str]
    reference: tuple[float, float]
    teacher_ids: Tensor
    teacher_logps: Tensor


class Pool:
    """All rows that at least one term with a weight uses.

    Args:
        pairs: A table of `records.PAIR`.
        reference: A table of `records.REFERENCE_LOGPS` for the preference rows; only `dpo` needs
            it, and so does the DPO score of the mask.
        objective: Decides which terms have a weight.

    Raises:
        DataError: No row is left, or a preference row has no reference log-probs.
    """

    def __init__(
        self, pairs: pa.Table, reference: pa.Table | None, objective: ObjectiveSpec
    ) -> None:
        pairs = records.require_columns(pairs, records.PAIR, "pairs")
        self.objective = objective
        self.weights = {name: getattr(objective, name) for name in TERMS}
        table = _with_reference(pairs, reference)
        eligible = {name: _eligible(table, name) for name in TERMS if self.weights[name] > 0}
        used = np.logical_or.reduce(list(eligible.values()))
        if not used.any():
            remedy = "add calibration prompts, or weights for other terms of patch.objective"
            raise DataError(f"no pair serves the terms {sorted(eligible)}", remedy=remedy)
        self.table = table.filter(pa.array(used))
        self.eligible = {name: mask[used] for name, mask in eligible.items()}
        if "dpo" in eligible:
            _require_reference(self.table)
        self.lengths = self._lengths()

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def rows(self, indices: Sequence[int]) -> list[Row]:
        """Return the rows at `indices`, each cut to the tokens that its terms need."""
        taken = self.table.take(pa.array(indices, pa.int64())).to_pylist()
        return [self._row(index, data) for index, data in zip(indices, taken, strict=True)]

    def counts(self, indices: Sequence[int]) -> dict[str, int]:
        """Return how many of the rows at `indices` each term applies to."""
        return {name: int(mask[list(indices)].sum()) for name, mask in self.eligible.items()}

    def mask_rows(self, mask: MaskSpec, seed: int) -> list[Row]:
        """Return the rows that SNIP scores: those of `mask.rows`, or any if none is a preference.

        Args:
            mask: At most `samples` rows are drawn without replacement. `loss` "nll" scores
                -log p(y_w | x) of whole answers, "dpo" the DPO loss.
            seed: Of the draw; the same rows at every re-masking.

        Raises:
            DataError: `mask.loss` is "dpo" and there is no preference row.
        """
        preferences = np.flatnonzero(_eligible(self.table, "dpo"))
        if mask.loss == "dpo" and not len(preferences):
            raise DataError(
                "patch.mask.loss is dpo, but no pair is a preference", remedy="use mask.loss: nll"
            )
        every = mask.rows == "all" or not len(preferences)
        return self._drawn(np.arange(len(self)) if every else preferences, mask, seed, mask.loss)

    def utility_rows(self, mask: MaskSpec, seed: int) -> list[Row]:
        """Return benign rows, whose answers the weights of `mask.score: set_difference` leave be.

        Raises:
            DataError: There is none.
        """
        benign = np.flatnonzero(pc.equal(self.table["kind"], "benign").to_numpy())
        if not len(benign):
            remedy = "raise pairs.benign, or use another patch.mask.score"
            raise DataError(
                "patch.mask.score is set_difference, but no pair is benign", remedy=remedy
            )
        return self._drawn(benign, mask, seed, "nll")

    def _drawn(self, found: np.ndarray, mask: MaskSpec, seed: int, term: str) -> list[Row]:
        drawn = np.sort(np.random.default_rng([seed, 1]).permutation(found)[: mask.samples])
        data = self.table.take(pa.array(drawn, pa.int64())).to_pylist()
        return [full_row(row, frozenset({term})) for row in data]

    def _row(self, index: int, data: dict[str, Any]) -> Row:
        terms = frozenset(name for name, mask in self.eligible.items() if mask[index])
        row = full_row(data, terms)
        if terms != {"kl"}:
            return row
        # A row that only `kl` uses needs no token behind the teacher's distribution.
        tokens = min(self.objective.kl_tokens, len(row.teacher_ids))
        return replace(row, chosen=row.chosen[:tokens])

    def _lengths(self) -> np.ndarray:
        prompt, chosen, rejected = (
            pc.list_value_length(self.table[name]).to_numpy()
            for name in ("prompt_ids", "chosen_ids", "rejected_ids")
        )
        kl_only = np.ones(len(self), bool)
        for name, mask in self.eligible.items():
            kl_only &= mask if name == "kl" else ~mask
        answer = np.where(kl_only, np.minimum(chosen, self.objective.kl_tokens), chosen)
        pairs = self.eligible.get("dpo", np.zeros(len(self), bool))
        answers: np.ndarray = np.where(pairs, np.maximum(answer, rejected), answer)
        return np.asarray(prompt + answers)


def full_row(data: Mapping[str, Any], terms: frozenset[str]) -> Row:
    """Return a row with its whole answers.

    Args:
        data: A row of `records.PAIR`, where it is at hand with the columns of
            `records.REFERENCE_LOGPS`; teacher columns may be absent.
        terms: The terms that apply to it; only "dpo" needs the rejected answer.
    """
    shape = (-1, data.get("teacher_top_k") or 1)
    return Row(
        prompt=data["prompt_ids"],
        chosen=data["chosen_ids"],
        rejected=data["rejected_ids"] if "dpo" in terms else [],
        terms=terms,
        reference=(data.get("chosen_logp") or 0.0, data.get("rejected_logp") or 0.0),
        teacher_ids=torch.tensor(data.get("teacher_ids") or [], dtype=torch.long).view(shape),
        teacher_logps=torch.tensor(data.get("teacher_logps") or []).float().view(shape),
    )


def total_steps(rows: int, spec: PatchSpec) -> int:
    """Return the number of optimizer steps: `steps`, or `epochs` passes over the rows."""
    return spec.steps or max(1, math.ceil(spec.epochs * rows / spec.batch_size))


def batch_at(rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Return the row indices of one global batch, a pure function of its arguments.

    The stream of rows is epoch after epoch, each a permutation drawn from (seed, epoch); step t
    sees its t-th run of `batch_size` rows. A restart therefore needs no cursor but the step.
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    epochs = {position // rows for position in positions}
    orders = {e: np.random.default_rng([seed, e]).permutation(rows) for e in epochs}
    return [int(orders[position // rows][position % rows]) for position in positions]


def share(
    indices: Sequence[int], lengths: np.ndarray, *, rank: int, world_size: int, micro: int
) -> list[list[int]]:
    """Return one rank's micro-batches of a global batch: rows of similar length together.

    Every rank gets equally many micro-batches (collectives must match); a rank that runs out of
    rows gets empty ones.
    """
    ordered = sorted(indices, key=lambda index: (lengths[index], index))
    mine = ordered[rank::world_size]
    most = math.ceil(len(ordered) / world_size)
    pieces = math.ceil(most / micro)
    size = math.ceil(most / pieces)
    return [mine[start * size : (start + 1) * size] for start in range(pieces)]


@dataclass(frozen=True)
class Batch:
    """Rows as tensors; N answer tokens in S sequences.

    Attributes:
        ids: (S, columns) right-padded inputs; an answer's last token is only a target.
        positions: (N,) where each answer token is predicted, in the flattened `ids`.
        targets: (N,) the answer tokens.
        sequence: (N,) the sequence of each answer token.
        answer_tokens: (S,) answer tokens per sequence.
        terms: term -> (rows,) the sequences of the chosen answers that it applies to.
        rejected: (dpo rows,) the sequences of the rejected answers.
        reference: (dpo rows, 2) log pi_Q0 of chosen and rejected, float64.
        kl_tokens: (M,) answer tokens (of N) with a teacher distribution.
        kl_rows: (M,) the kl row (of terms["kl"]) of each.
        teacher_ids: (M, k).
        teacher_logps: (M, k).
    """

    ids: Tensor
    positions: Tensor
    targets: Tensor
    sequence: Tensor
    answer_tokens: Tensor
    terms: dict[str, Tensor]
    rejected: Tensor
    reference: Tensor
    kl_tokens: Tensor
    kl_rows: Tensor
    teacher_ids: Tensor
    teacher_logps: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on `device`."""
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, terms={k: v.to(device) for k, v in self.terms.items()}, **moved)

    @property
    def tokens(self) -> int:
        """How many tokens the sequences hold, without padding."""
        starts = self.positions.new_zeros(len(self.ids))
        ends = starts.scatter_reduce(0, self.sequence, self.positions, "amax")
        return int((ends % self.ids.shape[1] + 1).sum())


def collate(rows: Sequence[Row], kl_tokens: int) -> Batch:
    """Lay rows out as one padded batch: a sequence per answer that some term needs."""
    chosen = list(range(len(rows)))
    pairs = [index for index, row in enumerate(rows) if "dpo" in row.terms]
    sequences = [(row.prompt, row.chosen) for row in rows]
    sequences += [(rows[index].prompt, rows[index].rejected) for index in pairs]
    ids, _ = right_pad([prompt + answer[:-1] for prompt, answer in sequences], pad=0)
    columns = ids.shape[1]
    positions = [
        torch.arange(len(answer)) + (number * columns + len(prompt) - 1)
        for number, (prompt, answer) in enumerate(sequences)
    ]
    lengths = torch.tensor([len(answer) for _, answer in sequences])
    terms = {t: torch.tensor([i for i in chosen if t in rows[i].terms]).long() for t in TERMS}
    starts = (lengths.cumsum(0) - lengths)[terms["kl"]].tolist()
    teachers = _teachers([rows[index] for index in terms["kl"].tolist()], starts, kl_tokens)
    return Batch(
        ids=ids,
        positions=torch.cat(positions),
        targets=torch.tensor([token for _, answer in sequences for token in answer]),
        sequence=torch.arange(len(sequences)).repeat_interleave(lengths),
        answer_tokens=lengths,
        terms=terms,
        rejected=torch.arange(len(rows), len(sequences)),
        reference=torch.tensor([rows[i].reference for i in pairs], dtype=torch.float64).view(-1, 2),
        **teachers,
    )


def _teachers(rows: Sequence[Row], starts: Sequence[int], kl_tokens: int) -> dict[str, Tensor]:
    counts = [min(kl_tokens, len(row.teacher_ids), len(row.chosen)) for row in rows]
    empty = torch.zeros(0, dtype=torch.long)
    places = [torch.arange(n) + start for n, start in zip(counts, starts, strict=True)]
    ids = [row.teacher_ids[:n] for n, row in zip(counts, rows, strict=True)]
    logps = [row.teacher_logps[:n] for n, row in zip(counts, rows, strict=True)]
    return {
        "kl_tokens": torch.cat(places) if rows else empty,
        "kl_rows": torch.arange(len(rows)).repeat_interleave(torch.tensor(counts).long()),
        "teacher_ids": torch.cat(ids) if rows else empty.view(0, 1),
        "teacher_logps": torch.cat(logps) if rows else torch.zeros(0, 1),
    }


def _with_reference(pairs: pa.Table, reference: pa.Table | None) -> pa.Table:
    if reference is None:
        empty = pa.nulls(pairs.num_rows, pa.float64())
        return pairs.append_column("chosen_logp", empty).append_column("rejected_logp", empty)
    where = "reference"
    reference = records.require_columns(reference, records.REFERENCE_LOGPS, where)
    known = {name: index for index, name in enumerate(reference["prompt_id"].to_pylist())}
    places = pa.array([known.get(name) for name in pairs["prompt_id"].to_pylist()], pa.int64())
    for name in ("chosen_logp", "rejected_logp"):
        pairs = pairs.append_column(name, reference[name].take(places))
    return pairs


def _require_reference(table: pa.Table) -> None:
    lacking = pc.and_(table["preference"], pc.is_null(table["chosen_logp"]))
    if pc.any(lacking).as_py():
        name = table.filter(lacking)["prompt_id"][0].as_py()
        remedy = "run the reference stage on the same pairs"
        raise DataError(f"pair {name!r} has no reference log-probs", remedy=remedy)


def _eligible(table: pa.Table, term: str) -> np.ndarray:
    if term == "anchor":
        found = pc.is_in(table["kind"], value_set=pa.array(ANCHOR_KINDS))
    elif term == "kl":
        found = pc.greater(pc.fill_null(pc.list_value_length(table["teacher_ids"]), 0), 0)
    else:
        found = table["preference"]
    return np.asarray(found.to_numpy(), dtype=bool)
