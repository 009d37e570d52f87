"""What computes completions from a model's files: the engines `transformers` and `vllm`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from qresafe.errors import DataError, ResourceError
from qresafe.failure import is_out_of_memory
from qresafe.hf.chat import continued_ids, prompt_text, render_ids, text_ids
from qresafe.hf.models import beside_the_codes, context_length, load_tokenizer
from qresafe.hf.warm import ModelInput, shelf
from qresafe.records import COMPLETION, PROMPT
from qresafe.specs import GenerateSpec
from qresafe.stages.conversation import converse, messages
from qresafe.stages.runtime import BatchFunction, BatchJob, Row

# A part holds what was generated; the prompts' own columns join it when the stage assembles.
ANSWER = pa.schema(
    [COMPLETION.field("prompt_id")]
    + [field for field in COMPLETION if field.name not in PROMPT.names]
)


class Engine(BatchJob, Protocol):
    """A `BatchJob` that completes prompts, made from (model, spec)."""

    def requests(self, prompts: Sequence[Row]) -> list[Row]:
        """Check all that can be checked before the work, and turn prompts into requests.

        Args:
            prompts: Rows of `records.PROMPT`.

        Returns:
            Plain rows with prompt_id, prompt_ids, target_ids (empty: none), `size` (what rows of
            a batch should have in common) and whatever else the engine needs.
        """


@dataclass(frozen=True)
class TransformersJob:
    """Completions by plain transformers in the worker's process."""

    model: ModelInput
    spec: GenerateSpec

    def requests(self, prompts: Sequence[Row]) -> list[Row]:
        return tokenize(self.model, prompts, self.spec)

    def setup(self, device: str) -> BatchFunction:
        from qresafe.hf.generate import generate_batch, sequence_logps

        model, tokenizer = shelf().load(self.model, device)

        def answer(rows: list[Row]) -> list[Row]:
            prompts = [row["prompt_ids"] for row in rows]
            keys = [row.get("key") or f"{row['prompt_id']}/{row['sample']}" for row in rows]
            made = generate_batch(model, tokenizer, prompts, keys, self.spec)
            return [
                answer_row(row, text=g.text, ids=g.ids, finish=g.finish)
                for row, g in zip(rows, made, strict=True)
            ]

        def ask(rows: list[Row], turn: int) -> list[Row]:
            asked = [
                row
                | {"key": f"{row['prompt_id']}/{row['sample']}/{turn}"}
                | {"prompt_ids": render_ids(tokenizer, row["messages"])}
                for row in rows
            ]
            return in_memory(answer, asked, error_rows)

        def score(rows: list[Row]) -> list[Row]:
            prompts, targets = ([row[k] for row in rows] for k in ("prompt_ids", "target_ids"))
            sums, counts = sequence_logps(model, prompts, targets)
            return [
                {"target_logp": logp, "target_tokens": count}
                for logp, count in zip(sums.tolist(), counts.tolist(), strict=True)
            ]

        def compute(rows: list[Row]) -> pa.Table:
            answers = in_memory(answer, rows, error_rows)
            converse(rows, answers, self.spec.system_prompt, ask)
            with_target = [i for i, row in enumerate(rows) if row["target_ids"]]
            targets = [rows[i] for i in with_target]
            scores = in_memory(score, targets, lambda some, _: [{}] * len(some)) if targets else []
            for index, scored in zip(with_target, scores, strict=True):
                answers[index] |= scored
            return pa.Table.from_pylist(answers, schema=ANSWER)

        return compute


@dataclass(frozen=True)
class VllmJob:
    """Completions by vLLM, which only the Ray runtime can run (`qresafe.dist.vllm`).

    Targets are not scored, and vLLM's kernels make results depend on what shares a batch.
    """

    model: ModelInput
    spec: GenerateSpec

    def requests(self, prompts: Sequence[Row]) -> list[Row]:
        if any(row.get("follow_ups") for row in prompts):
            remedy = "use engine transformers or openai"
            raise DataError("engine 'vllm' answers one turn, and prompts have more", remedy=remedy)
        if extra := beside_the_codes(self.model.ref.path):
            what = f"engine 'vllm' would leave out {extra}"
            remedy = "use engine transformers, or a checkpoint that has it merged"
            raise DataError(what, where=self.model.ref.path, remedy=remedy)
        return [row | {"target_ids": []} for row in tokenize(self.model, prompts, self.spec)]

    def setup(self, device: str) -> BatchFunction:
        remedy = "set resources.workers and resources.gpus_per_worker, or use engine transformers"
        raise ResourceError("engine 'vllm' runs on Ray workers with a GPU each", remedy=remedy)


def tokenize(model: ModelInput, prompts: Sequence[Row], spec: GenerateSpec) -> list[Row]:
    """Return request rows with prompt_ids, target_ids and size.

    Raises:
        DataError: A prompt with its answer or target is longer than the model's context.
        ModelError: The tokenizer has no chat template, or it fails.
    """
    ref = model.ref
    tokenizer = load_tokenizer(ref.path, trust_remote_code=ref.trust_remote_code)
    context = context_length(ref.path, ref.trust_remote_code)
    rows = []
    for prompt in prompts:
        asked = prompt_text(tokenizer, prompt["prompt"], spec.system_prompt)
        ids = text_ids(tokenizer, asked)
        target = continued_ids(tokenizer, asked, prompt["target"] or "")
        follow_ups = prompt.get("follow_ups") or []
        before = _longest_prompt(tokenizer, prompt, spec) if follow_ups else len(ids)
        room = max(spec.max_new_tokens * (1 + len(follow_ups)), len(target))
        if context is not None and before + room > context:
            what = f"the prompt's {before} tokens and {room} of its answer exceed the context"
            remedy = "shorten the prompt or lower generate.max_new_tokens"
            where = f"prompt {prompt['prompt_id']!r} (context: {context} tokens)"
            raise DataError(what, where=where, remedy=remedy)
        row = {
            "prompt_id": prompt["prompt_id"],
            "prompt_ids": ids,
            "target_ids": target,
            "size": len(ids),
        }
        turns = {"prompt": prompt["prompt"], "follow_ups": follow_ups} if follow_ups else {}
        rows.append(row | turns)
    return rows


def _longest_prompt(tokenizer: Any, prompt: Row, spec: GenerateSpec) -> int:
    """Return the tokens of all that the user says, in the template, without the answers."""
    brief = {"completion": "x", "follow_up_answers": ["x"] * (len(prompt["follow_ups"]) - 1)}
    return len(render_ids(tokenizer, messages(prompt, brief, spec.system_prompt)))


def answer_row(
    row: Row,
    *,
    finish: str,
    text: str = "",
    ids: Sequence[int] = (),
    new_tokens: int | None = None,
    error: str | None = None,
) -> Row:
    """Return a row of `ANSWER` for a request row; new_tokens for engines that show no ids."""
    return {
        "prompt_id": row["prompt_id"],
        "sample": row["sample"],
        "completion": text,
        "completion_ids": list(ids),
        "prompt_tokens": len(row["prompt_ids"]),
        "new_tokens": len(ids) if new_tokens is None else new_tokens,
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
