"""What computes completions: one `BatchJob` per engine of `GenerateSpec`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from qresafe.hf.warm import ModelInput, shelf
from qresafe.records import COMPLETION, PROMPT
from qresafe.specs import GenerateSpec
from qresafe.stages.runtime import BatchFunction, Row

# A part holds what was generated; the prompts' own columns join it when the stage assembles.
ANSWER = pa.schema(
    [COMPLETION.field("prompt_id")]
    + [field for field in COMPLETION if field.name not in PROMPT.names]
)


@dataclass(frozen=True)
class TransformersJob:
    """Completions by plain transformers in the worker's process.

    Rows hold prompt_id, sample, prompt_ids and target_ids (empty without a target).
    """

    model: ModelInput
    spec: GenerateSpec

    def setup(self, device: str) -> BatchFunction:
        from qresafe.hf.generate import generate_batch, sequence_logps

        model, tokenizer = shelf().load(self.model, device)

        def answer(rows: list[Row]) -> list[Row]:
            prompts = [row["prompt_ids"] for row in rows]
            keys = [f"{row['prompt_id']}/{row['sample']}" for row in rows]
            made = generate_batch(model, tokenizer, prompts, keys, self.spec)
            return [
                answer_row(row, text=g.text, ids=g.ids, finish=g.finish)
                for row, g in zip(rows, made, strict=True)
            ]

        def score(rows: list[Row]) -> list[Row]:
            prompts, targets = ([row[k] for row in rows] for k in ("prompt_ids", "target_ids"))
            sums, counts = sequence_logps(model, prompts, targets)
            return [
                {"target_logp": logp, "target_tokens": count}
                for logp, count in zip(sums.tolist(), counts.tolist(), strict=True)
            ]

        def compute(rows: list[Row]) -> pa.Table:
            answers = in_memory(answer, rows, error_rows)
            with_target = [i for i, row in enumerate(rows) if row["target_ids"]]
            targets = [rows[i] for i in with_target]
            scores = in_memory(score, targets, lambda some, _: [{}] * len(some)) if targets else []
            for index, scored in zip(with_target, scores, strict=True):
                answers[index] |= scored
            return pa.Table.from_pylist(answers, schema=ANSWER)

        return compute


def answer_row(
    row: Row, *, text: str = "", ids: Sequence[int] = (), finish: str, error: str | None = None
) -> Row:
    """Return a row of `ANSWER` for a request row."""
    return {
        "prompt_id": row["prompt_id"],
        "sample": row["sample"],
        "completion": text,
        "completion_ids": list(ids),
        "prompt_tokens": len(row["prompt_ids"]),
        "new_tokens": len(ids),
        "finish": finish,
        "error": error,
    }


def error_rows(rows: Sequence[Row], reason: str) -> list[Row]:
    """Return rows that say why there is no completion."""
    return [answer_row(row, finish="error", error=reason) for row in rows]


def in_memory(
    function: Callable[[list[Row]], list[Row]],
    rows: list[Row],
    give_up: Callable[[list[Row], str], list[Row]],
) -> list[Row]:
    """Apply `function`; where memory runs out, to each half; where it does again, give up."""
    try:
        return function(rows)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    # Outside the handler: the error's traceback would keep the tensors alive.
    middle = (len(rows) + 1) // 2
    return [
        made for half in (rows[:middle], rows[middle:]) for made in _half(function, half, give_up)
    ]


def _half(function: Any, rows: list[Row], give_up: Any) -> list[Row]:
    if not rows:
        return []
    try:
        return list(function(rows))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    return list(give_up(rows, "out of memory: lower generate.batch_size"))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether torch or Python ran out of memory (the CPU allocator has no own type)."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error)
