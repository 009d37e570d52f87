"""Batched completions and log-probabilities of any Hugging Face causal language model."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from qresafe.errors import ModelError
from qresafe.hf.batching import left_pad, right_pad
from qresafe.hf.chat import end_id
from qresafe.hf.kv_cache import preallocated_cache
from qresafe.hf.sampling import Sampler

if TYPE_CHECKING:  # so that a bare GPU machine needs no pydantic (bench/gpu.py)
    from qresafe.specs import GenerateSpec

# Rows that ended are dropped when so few are left that copying the others' cache pays.
COMPACT_BELOW = 0.75


@dataclass(frozen=True)
class Generated:
    """One completion.

    Attributes:
        ids: New tokens, with the end token if it came.
        text: The decoded tokens without special ones.
        finish: "stop" if the model ended, "length" if it was cut at `max_new_tokens`.
    """

    ids: list[int]
    text: str
    finish: Literal["stop", "length"]


def generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[str],
    spec: GenerateSpec,
) -> list[Generated]:
    """Complete a batch of prompts.

    Args:
        model: A causal LM in evaluation mode; its device is used.
        tokenizer: Its tokenizer, for the stop tokens and the text.
        prompts: Token ids, non-empty; similar lengths waste least.
        keys: One per prompt; the sampling noise is keyed by it (see `Sampler`).
        spec: max_new_tokens, temperature, top_k, top_p, seed.

    Returns:
        One completion per prompt, in order.

    Raises:
        ModelError: The architecture has no key-value cache (pure state-space models).
    """
    return generate_branches(model, tokenizer, prompts, [Branch(keys, spec)])[0]


@dataclass(frozen=True)
class Branch:
    """One of several ways to continue the same prompts: noise keys, one per prompt, and spec."""

    keys: Sequence[str]
    spec: GenerateSpec


def generate_branches(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    branches: Sequence[Branch],
) -> list[list[Generated]]:
    """Complete a batch of prompts once per branch; the prompts themselves are read only once.

    Every branch continues from a copy of the prompts' key-value cache, so its tokens are those of
    `generate_batch` with its keys and spec, to the bit.

    Args:
        model: A causal LM in evaluation mode; its device is used.
        tokenizer: Its tokenizer, for the stop tokens and the text.
        prompts: Token ids, non-empty.
        branches: At least one.

    Returns:
        Per branch, one completion per prompt, in order.

    Raises:
        ModelError: The architecture has no key-value cache (pure state-space models).
    """
    kind: Any = type(model)
    if "past_key_values" not in _parameters(kind):
        remedy = "use a model with attention layers, or serve it and use engine 'openai'"
        raise ModelError(f"{kind.__name__} has no key-value cache", remedy=remedy)
    stops = stop_ids(model, tokenizer)
    made = []
    with torch.no_grad():
        prefix = _Prefix(model, prompts, max(b.spec.max_new_tokens for b in branches), stops[0])
        for place, branch in enumerate(branches, 1):
            # The last one needs no copy: nobody continues after it.
            cache = prefix.cache if place == len(branches) else copy.deepcopy(prefix.cache)
            decoder = _Decoder(prefix, cache, branch, stops)
            while decoder.step < branch.spec.max_new_tokens and decoder.advance():
                pass
            made.append(_decoded(tokenizer, decoder.results()))
    return made


def _decoded(tokenizer: Any, rows: Sequence[tuple[list[int], bool]]) -> list[Generated]:
    texts = tokenizer.batch_decode([ids for ids, _ in rows], skip_special_tokens=True)
    return [
        Generated(ids, text, "stop" if stopped else "length")
        for (ids, stopped), text in zip(rows, texts, strict=True)
    ]


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: the model's, the tokenizer's and the template's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    found = {*listed, tokenizer.eos_token_id, end_id(tokenizer)}
    return sorted(int(token) for token in found if token is not None)


class _Prefix:
    """A batch of prompts that the model has read: their cache, and the logits that follow."""

    def __init__(
        self, model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, pad: int
    ) -> None:
        device = model.device
        ids, mask = left_pad(prompts, pad)
        rows, self.width = ids.shape
        capacity = self.width + new_tokens
        self.model = model
        self.cache = preallocated_cache(model, capacity)
        self.mask = torch.ones((rows, capacity), dtype=torch.long, device=device)
        self.mask[:, : self.width] = mask.to(device)
        self.positions = (self.mask[:, : self.width].cumsum(dim=1) - 1).clamp(min=0)
        read = self.mask[:, : self.width]
        self.logits = _next_logits(model, ids.to(device), read, self.positions, self.cache)


class _Decoder:
    """The state of one branch: live rows, their cache, and what all rows have produced."""

    def __init__(self, prefix: _Prefix, cache: Any, branch: Branch, stops: list[int]) -> None:
        device, spec = prefix.model.device, branch.spec
        rows = len(prefix.mask)
        self.model, self.width, self.step = prefix.model, prefix.width, 0
        self.cache = cache
        self.sampler = Sampler(spec, branch.keys, device)
        self.stops = torch.tensor(stops, device=device)
        self.mask, self.positions = prefix.mask, prefix.positions
        self.logits: Tensor | None = prefix.logits  # of the first new token
        self.fed = prefix.mask  # not looked at before the first token is there
        self.output = torch.zeros((rows, spec.max_new_tokens), dtype=torch.long, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.stopped = torch.zeros(rows, dtype=torch.bool, device=device)
        self.live = torch.arange(rows, device=device)  # the rows that the cache holds

    def advance(self) -> bool:
        """Add one token to every live row; return whether any row goes on."""
        token = self.sampler.pick(self._logits())
        going = ~self.stopped[self.live]
        self.output[self.live, self.step] = token
        self.lengths[self.live] += going
        self.stopped[self.live] |= torch.isin(token, self.stops)
        self.step += 1
        self.fed, self.positions = token[:, None], self.positions[:, -1:] + 1
        return self._compact()

    def results(self) -> list[tuple[list[int], bool]]:
        """Return (ids, whether it stopped by itself) of each row."""
        lengths, stopped = self.lengths.tolist(), self.stopped.tolist()
        output = self.output.tolist()
        return [(output[row][: lengths[row]], stopped[row]) for row in range(len(output))]

    def _logits(self) -> Tensor:
        first, self.logits = self.logits, None
        if first is not None:
            return first
        mask = self.mask[:, : self.width + self.step]
        return _next_logits(self.model, self.fed, mask, self.positions, self.cache)

    def _compact(self) -> bool:
        going = (~self.stopped[self.live]).nonzero().flatten()
        if len(going) == 0:
            return False
        if len(going) <= COMPACT_BELOW * len(self.live):
            self.cache.reorder_cache(going)
            self.sampler.keep(going.tolist())
            self.live, self.mask = self.live[going], self.mask[going]
            self.fed, self.positions = self.fed[going], self.positions[going]
        return True


def _next_logits(model: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
    """Feed tokens, which the cache takes up, and return the logits of the next: (rows, vocab)."""
    optional = {"position_ids": positions, "logits_to_keep": 1}
    result = model(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        **accepted(type(model), optional),
    )
    return result.logits[:, -1]


def sequence_logps(
    model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Score answers: the sum of log p(answer tokens | prompt and the tokens before), in nats.

    Args:
        model: A causal LM in evaluation mode.
        prompts: Token ids of each prompt, non-empty.
        answers: Token ids of each answer, non-empty.

    Returns:
        Sums (rows,) float64 and token counts (rows,) int64, on the CPU.
    """
    logps = [
        row.gather(-1, torch.tensor(answer, device=row.device)[:, None]).double().sum().cpu()
        for row, answer in zip(_answer_logps(model, prompts, answers), answers, strict=True)
    ]
    return torch.stack(logps), torch.tensor([len(answer) for answer in answers])


def teacher_distribution(
    model: Any,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    tokens: int,
    top_k: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return a model's likeliest next tokens along the beginning of its own answers.

    Args:
        model: The teacher, in evaluation mode.
        prompts: Token ids of each prompt, non-empty.
        answers: Token ids of each answer, non-empty.
        tokens: How many of each answer's first tokens to describe.
        top_k: Entries to keep per token; at most the vocabulary's size are returned.

    Returns:
        Per row: token ids (n, k) int64 and their log-probabilities (n, k) float32 in falling
        order, on the CPU; n = min(tokens, answer's length). Entry t is p(. | prompt, answer[:t]).
    """
    starts = [answer[:tokens] for answer in answers]
    logps = _answer_logps(model, prompts, starts)
    tops = [row.topk(min(top_k, row.shape[-1]), dim=-1) for row in logps]
    return [top.indices.cpu() for top in tops], [top.values.cpu() for top in tops]


def _answer_logps(
    model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Return log p(. | prefix) of each answer position: per row (answer tokens, vocabulary)."""
    joined = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    ids, mask = right_pad(joined, pad=0)
    first = min(map(len, prompts)) - 1
    positions = list(range(first, ids.shape[1] - 1))  # a tensor would be on one of several GPUs
    optional = accepted(type(model), {"logits_to_keep": positions})
    result = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), **optional)
    kept = result.logits if optional else result.logits[:, first:-1]
    spans = [(len(p) - 1 - first, len(a)) for p, a in zip(prompts, answers, strict=True)]
    return [
        row[start : start + count].float().log_softmax(dim=-1)
        for row, (start, count) in zip(kept, spans, strict=True)
    ]


@functools.cache
def _parameters(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def accepted(kind: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that this kind of model's forward method names."""
    return {name: value for name, value in arguments.items() if name in _parameters(kind)}
