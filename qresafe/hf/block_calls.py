"""One decoder block at a time: what it is called with on calibration text, and what it sees."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qresafe.errors import ModelError
from qresafe.hf.batching import right_pad


@dataclass(frozen=True)
class Batch:
    """Token ids (rows, width) and which of them are text, not padding."""

    ids: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Call:
    """One call of a block: its arguments, and which tokens (rows, width) are text."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor

    def on(self, block: nn.Module) -> Tensor:
        """Return the block's hidden states (rows, width, hidden)."""
        made = block(*self.args, **self.kwargs)
        return made[0] if isinstance(made, tuple) else made


class _Reached(Exception):
    """Ends a forward pass at the block that was waited for."""


def batches_of(sequences: Sequence[list[int]], size: int, pad: int, device: str) -> list[Batch]:
    """Return the sequences in their order, padded on the right to the longest of each batch."""
    batches = []
    for start in range(0, len(sequences), size):
        ids, mask = right_pad(sequences[start : start + size], pad)
        batches.append(Batch(ids.to(device), mask.to(device).bool()))
    return batches


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the decoder's blocks by name, in order.

    Raises:
        ModelError: The model has no list of blocks.
    """
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise ModelError("the model has no list of blocks", remedy="use a decoder-only model")
    prefix, longest = max(lists, key=lambda pair: len(pair[1]))
    return {f"{prefix}.{index}": block for index, block in enumerate(longest)}


def calls_of(model: nn.Module, block: nn.Module, batches: Iterable[Batch]) -> list[Call]:
    """Run the model up to `block` on every batch, and return what the block is called with."""
    calls: list[Call] = []

    def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(Call(args, dict(kwargs), batch.mask))
        raise _Reached

    with torch.no_grad(), block.register_forward_pre_hook(keep, with_kwargs=True):
        for batch in batches:
            try:
                model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False)
            except _Reached:
                continue
    return calls


class Passage:
    """The calls of one block after the other on all batches, so that each block runs once.

    Models call their blocks with masks and positions that do not depend on the hidden states, and
    hand these from block to block. So the calls are recorded once, with blocks that hand on what
    they get; then hidden states go through one block at a time.

    Args:
        model: The whole model; the first of its blocks runs once.
        blocks: All its blocks, in their order.
        batches: At least one.

    Raises:
        ModelError: The model does something to the hidden states between two blocks.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], batches: list[Batch]) -> None:
        self._calls = _recorded(model, blocks, batches)
        self._hidden = [calls[0].args[0] for calls in self._calls]

    def calls(self, number: int) -> list[Call]:
        """Return the calls of the block that is next, the `number`th."""
        frames = [calls[number] for calls in self._calls]
        return [
            Call((hidden, *frame.args[1:]), frame.kwargs, frame.mask)
            for hidden, frame in zip(self._hidden, frames, strict=True)
        ]

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def pass_through(self, number: int, block: nn.Module) -> None:
        """Put a block's outputs in the place of its inputs."""
        self._hidden = [call.on(block) for call in self.calls(number)]


@torch.no_grad()  # type: ignore[untyped-decorator]
def _recorded(
    model: nn.Module, blocks: Sequence[nn.Module], batches: list[Batch]
) -> list[list[Call]]:
    """Return every block's call by batch, all of them with the first one's hidden states."""
    first = calls_of(model, blocks[0], batches[:1])[0]
    in_tuple = isinstance(blocks[0](*first.args, **first.kwargs), tuple)
    found: list[list[Call]] = []

    def hand_on(*args: Any, **kwargs: Any) -> Any:
        if not args or (found[-1] and found[-1][-1].args[0] is not args[0]):
            what = "the model changes hidden states between its blocks"
            raise ModelError(what, remedy="use quantize.method: gptq")
        found[-1].append(Call(args, kwargs, batch.mask))
        return (args[0],) if in_tuple else args[0]

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_standing_in(block, hand_on))
        for batch in batches:
            found.append([])
            model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False)
    return found


@contextmanager
def _standing_in(block: nn.Module, forward: Any) -> Iterator[None]:
    own = block.__dict__.get("forward")
    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if own is not None:
            block.forward = own


def second_moments(
    block: nn.Module, layers: dict[str, nn.Module], calls: Sequence[Call]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return X X^T (in, in) of every layer's inputs in float32, and the block's outputs."""
    moments: dict[str, Tensor] = {}
    outputs = []

    def adding(name: str) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen = inputs[0][call.mask].float()
            product = seen.T @ seen
            moments[name] = moments[name] + product if name in moments else product

        return add

    with torch.no_grad(), ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(adding(name)))
        for call in calls:
            outputs.append(call.on(block))
    return moments, outputs
