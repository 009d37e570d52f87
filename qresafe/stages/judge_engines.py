"""Local models that judge completions: guards that write, graders that score, classifiers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from qresafe.errors import ModelError, SpecError
from qresafe.hf.chat import render_ids
from qresafe.hf.models import ModelRef, context_length, load_config, load_tokenizer, resolve
from qresafe.hf.warm import Kind, ModelInput, shelf
from qresafe.judge_specs import ClassifierSpec
from qresafe.judges import answers, labels
from qresafe.judges.base import Verdict
from qresafe.judges.templates import Template, template
from qresafe.records import Axis, Outcome
from qresafe.specs import GenerateSpec, ModelSpec
from qresafe.stages.engines import in_memory
from qresafe.stages.runtime import BatchFunction, BatchJob, Row

GRADES = ("1", "2", "3", "4", "5")  # the tokens that StrongREJECT's grader chooses among
# What a judge's model answered; `id` is the caller's. A part of a stage holds just this.
ASKED = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("answer", pa.string()),
        pa.field("prompt_tokens", pa.int32(), nullable=False),
        pa.field("new_tokens", pa.int32(), nullable=False),
        pa.field("cached", pa.bool_(), nullable=False),
        pa.field("error", pa.string()),
    ]
)


class ModelJudge(BatchJob, Protocol):
    """A judge that asks a model: a `BatchJob` from requests to `ASKED`."""

    @property
    def identity(self) -> dict[str, Any]:
        """What the answers depend on, as JSON-able data: a part of the stage's key."""

    @property
    def batch_size(self) -> int:
        """How many requests are computed together."""

    def not_for(self, axis: Axis) -> str | None:
        """Return why prompts of `axis` are not judged; None if they are."""

    def requests(self, rows: Sequence[Row]) -> list[Row]:
        """Turn rows with id, prompt and completion into requests.

        Returns:
            In the same order: rows with `id`, `size` (what a batch should have in common), and
            `error`, the reason why the model cannot be asked, or None.
        """

    def verdict(self, axis: Axis, answer: str) -> Verdict:
        """Read the model's answer."""


def asked(row: Row, answer: str | None, *, new_tokens: int = 0, error: str | None = None) -> Row:
    """Return a row of `ASKED` for a request that a local model answered."""
    size = {"prompt_tokens": row["size"], "new_tokens": new_tokens, "cached": False}
    return {"id": row["id"], "answer": answer, "error": error} | size


@dataclass(frozen=True)
class LocalJudge:
    """What both kinds of local judges have: a model folder and its settings."""

    model: ModelInput
    spec: ClassifierSpec

    @property
    def identity(self) -> dict[str, Any]:
        return _identity(self.model, self.spec)

    @property
    def batch_size(self) -> int:
        return self.spec.batch_size


class LabelJudge(LocalJudge):
    """A sequence classifier whose labels are outcomes."""

    def not_for(self, axis: Axis) -> str | None:
        return None

    def requests(self, rows: Sequence[Row]) -> list[Row]:
        from qresafe.hf.verdicts import encode

        tokenizer, room = _tokenizer(self.model), _room(self.model, 0)
        made = []
        for row in rows:
            pair = (row["prompt"], row["completion"])
            read = encode(tokenizer, *(pair if self.spec.reads == "pair" else pair[1:]))
            made.append(_request(row["id"], read.ids, room) | {"types": read.types})
        return made

    def setup(self, device: str) -> BatchFunction:
        from qresafe.hf.verdicts import Encoded, label_probabilities

        model, tokenizer = shelf().load(self.model, device)

        def classify(rows: list[Row]) -> list[Row]:
            texts = [Encoded(row["ids"], row["types"]) for row in rows]
            best = label_probabilities(model, tokenizer, texts).max(dim=-1)
            return [
                asked(row, labels.describe(model.config.id2label[place], value))
                for row, place, value in zip(
                    rows, best.indices.tolist(), best.values.tolist(), strict=True
                )
            ]

        return _batches(classify)

    def verdict(self, axis: Axis, answer: str) -> Verdict:
        return labels.verdict(answer, self.outcomes, self.spec.threshold)

    @functools.cached_property
    def outcomes(self) -> Mapping[str, Outcome]:
        """Label -> outcome of every label of the model."""
        config = load_config(Path(self.model.ref.path))
        return labels.outcomes_of(
            list(config.id2label.values()), self.spec.labels, f"judge {self.spec.title}"
        )


class GuardJudge(LocalJudge):
    """A causal LM that was trained to judge, asked by the prompt that it was trained on."""

    @property
    def published(self) -> Template:
        """The prompt; of `llama_guard` only how answers are written, its prompt is in the model."""
        own_template = self.spec.template == "llama_guard"
        return template("llama_guard_3" if own_template else self.spec.template)

    def not_for(self, axis: Axis) -> str | None:
        if axis == "harmful" or self.published.answer == "wildguard":
            return None
        return f"{self.spec.title} looks for harm, not for refusals"

    def requests(self, rows: Sequence[Row]) -> list[Row]:
        tokenizer = _tokenizer(self.model)
        room = _room(self.model, max(self.published.max_new_tokens, 1))
        return [_request(row["id"], self.prompt_ids(tokenizer, row), room) for row in rows]

    def prompt_ids(self, tokenizer: Any, row: Row) -> list[int]:
        """Return the token ids that the guard reads for a row with prompt and completion."""
        prompt, completion = row["prompt"], row["completion"]
        if self.spec.template == "llama_guard":
            turns = [{"role": "user", "content": prompt}]
            return render_ids(tokenizer, [*turns, {"role": "assistant", "content": completion}])
        published = self.published
        if limit := published.completion_tokens:
            ids = tokenizer(completion, max_length=limit, truncation=True)["input_ids"]
            completion = tokenizer.decode(ids, skip_special_tokens=True)
        text = published.render(prompt=prompt, completion=completion)
        return list(tokenizer.encode(text, add_special_tokens=published.special_tokens))

    def setup(self, device: str) -> BatchFunction:
        model, tokenizer = shelf().load(self.model, device)
        if self.published.answer == "score":
            return _batches(functools.partial(_grade, model, grade_tokens(tokenizer)))
        spec = GenerateSpec(max_new_tokens=self.published.max_new_tokens)
        return _batches(functools.partial(_write, model, tokenizer, spec))

    def verdict(self, axis: Axis, answer: str) -> Verdict:
        kind = self.published.answer
        assert kind is not None
        if kind == "score":
            return answers.score(axis, answer, self.spec.threshold)
        return answers.READERS[kind](axis, answer)


def local_judge(spec: ClassifierSpec) -> LabelJudge | GuardJudge:
    """Return the judge of a spec after checking what can be checked without its weights.

    Raises:
        ModelError: There is no such model, or it lacks a chat template or tokens that it needs.
        SpecError: A label has no outcome.
    """
    where = f"judge {spec.title}"
    ref = _resolved(spec, where)
    if spec.template == "labels":
        judge = LabelJudge(ModelInput.of(ref, "classifier"), spec)
        _ = judge.outcomes  # refuses a label without an outcome
        return judge
    if spec.labels:
        what = f"template {spec.template!r} has no labels of the model's own"
        raise SpecError(what, where=where, remedy="leave labels out, or use template: labels")
    kind: Kind = "chat" if spec.template == "llama_guard" else "guard"
    guard = GuardJudge(ModelInput.of(ref, kind), spec)
    tokenizer = _tokenizer(guard.model)
    guard.prompt_ids(tokenizer, {"prompt": "a prompt", "completion": "an answer"})
    if guard.published.answer == "score":
        grade_tokens(tokenizer)
    if tokenizer.eos_token is None:
        remedy = "set eos_token in tokenizer_config.json"
        raise ModelError("the guard's tokenizer has no end token", where=where, remedy=remedy)
    return guard


def _resolved(spec: ClassifierSpec, where: str) -> ModelRef:
    named = spec.model_dump(include={"path", "revision", "dtype", "trust_remote_code"})
    try:
        return resolve(ModelSpec.model_validate(named))
    except ModelError as error:
        place = where if error.where == "model.path" else error.where
        raise ModelError(error.what, where=place, remedy=error.remedy) from None


def grade_tokens(tokenizer: Any) -> list[int]:
    """Return the tokens of the grades 1 to 5.

    Raises:
        ModelError: The tokenizer has no token of its own for one of them.
    """
    known = tokenizer.get_vocab()
    if missing := [grade for grade in GRADES if grade not in known]:
        remedy = "use the tokenizer that came with the grader"
        where = str(tokenizer.name_or_path)
        raise ModelError(f"no token {missing[0]!r} in the vocabulary", where=where, remedy=remedy)
    return [known[grade] for grade in GRADES]


def _write(model: Any, tokenizer: Any, spec: GenerateSpec, rows: list[Row]) -> list[Row]:
    from qresafe.hf.generate import generate_batch

    keys = [row["id"] for row in rows]
    made = generate_batch(model, tokenizer, [row["ids"] for row in rows], keys, spec)
    return [
        asked(row, answer.text, new_tokens=len(answer.ids))
        for row, answer in zip(rows, made, strict=True)
    ]


def _grade(model: Any, tokens: list[int], rows: list[Row]) -> list[Row]:
    """Answer with the expected grade, 1 to 5 mapped onto 0 to 1, as the published evaluator."""
    import torch

    from qresafe.hf.verdicts import next_token_probabilities

    shares = next_token_probabilities(model, [row["ids"] for row in rows], tokens)
    scores = shares @ torch.linspace(0, 1, len(tokens))
    return [asked(row, f"{value:.6f}") for row, value in zip(rows, scores.tolist(), strict=True)]


def _batches(function: Callable[[list[Row]], list[Row]]) -> BatchFunction:
    def give_up(rows: list[Row], reason: str) -> list[Row]:
        return [
            asked(row, None, error="out of memory: lower the judge's batch_size") for row in rows
        ]

    def compute(rows: list[Row]) -> pa.Table:
        return pa.Table.from_pylist(in_memory(function, rows, give_up), schema=ASKED)

    return compute


def _request(identifier: str, ids: list[int], room: int | None) -> Row:
    error = None
    if room is not None and len(ids) > room:
        error = f"too long for the judge: {len(ids)} tokens, it reads {room}"
    return {"id": identifier, "ids": ids, "size": len(ids), "error": error}


def _identity(model: ModelInput, spec: ClassifierSpec) -> dict[str, Any]:
    left_out = {"name", "path", "revision", "trust_remote_code"}
    return spec.model_dump(mode="json", exclude=left_out) | {"model": model.key}


def _tokenizer(model: ModelInput) -> Any:
    trust = model.ref.trust_remote_code
    return load_tokenizer(model.ref.path, trust_remote_code=trust, chat=model.kind == "chat")


def _room(model: ModelInput, answer: int) -> int | None:
    """Return how many tokens a prompt may have; None if the model does not say."""
    limit = context_length(model.ref.path, model.ref.trust_remote_code)
    return limit - answer if limit is not None else None
