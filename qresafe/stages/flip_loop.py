"""The loop of a discrete patch: try a few code flips, keep them if the loss falls.

Two phases. Flipping: a round takes the gradient on some rows and flips the codes with the largest
first-order gains. If the loss on the probe rows does not fall, the flips are taken back and half
as many are tried; if it does, half as many again, by the gradient on other rows. It ends at the
budget, or when several gradients in a row bring nothing. Removing: the flips that seem to matter
least are undone in blocks, as long as that loss does not rise.

Whatever happens in round t depends on the spec, the pool and the state after round t - 1 alone,
and rows are cut into pieces in the same way for any number of workers: a run that was killed and
resumed, and one on more workers, ends with the same codes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from upath import UPath

from qresafe.core import sparse_patch
from qresafe.core.flips import Move, flip_count, greedy_move, undoing_move
from qresafe.core.grids import QuantizedTensor
from qresafe.core.ladder import ladder_of
from qresafe.errors import DivergedError
from qresafe.hf.answer_head import AnswerHead
from qresafe.hf.recompute import recompute_blocks
from qresafe.progress import Progress
from qresafe.specs import PatchSpec
from qresafe.stages import patch_state
from qresafe.stages.flip_loss import FlipLoss
from qresafe.stages.patch_loop import PatchInputs, Watch, same_checkpoint
from qresafe.stages.patch_output import write_changes, write_history
from qresafe.stages.train_engine import TrainEngine

FLIPPING, REMOVING, DONE = "flip", "remove", "done"


def flip_codes(
    engine: TrainEngine,
    inputs: PatchInputs,
    spec: PatchSpec,
    folder: UPath,
    progress: Progress,
    watch: Watch | None = None,
) -> None:
    """Make a discrete patch, or continue the one that `folder` holds a checkpoint of.

    Leaves codes.safetensors, delta.safetensors and history.jsonl in `folder`, like a trained
    patch; see `patch_loop.train_patch` for the arguments.

    Raises:
        ModelError: The grid of a layer has no neighbours (additive codebooks).
        DivergedError: The loss of Q0 is not finite.
        ResourceError: The ranks do not see the same folder.
    """
    loop = FlipLoop(engine, inputs, spec)
    loop.resume(folder)
    progress.advance(loop.state.round, "resumed" if loop.state.round else "")
    seen = [record for record in loop.history if "probe" in record]
    while loop.state.phase != DONE:
        record = loop.advance()
        progress.advance(1, f"loss {record['loss']:.4f}, {record['flips']} codes")
        if watch and loop.state.round % watch.every == 0:
            record["probe"] = watch.look(loop.model)
            seen.append(record)
        loop.save(folder)
        while watch and seen:  # once it is saved: who is told may end this process
            watch.tell(seen.pop(0))
    loop.write_results(folder)


@dataclass(frozen=True)
class State:
    """Where a run stands, beside its codes.

    Attributes:
        phase: FLIPPING, REMOVING or DONE.
        round: Rounds done.
        size: How many codes the next round tries.
        batch: Number of the rows that the gradient is taken on.
        failed: Batches in a row of which nothing was kept.
        loss: On the probe rows, with the present codes.
        means: The same by kind.
    """

    phase: str
    round: int
    size: int
    batch: int
    failed: int
    loss: float
    means: tuple[float, ...]


class FlipLoop:
    """One rank's model, codes and state; all ranks hold the same."""

    def __init__(self, engine: TrainEngine, inputs: PatchInputs, spec: PatchSpec) -> None:
        self.engine, self.spec, self.model = engine, spec.flips, inputs.model
        self.loss = FlipLoss(inputs.pool, spec.flips, spec.micro_batch_size, spec.seed)
        self.ladders = {
            name: ladder_of(layer.grid, f"layer {name!r}").to(engine.device)
            for name, layer in inputs.quantized.items()
        }
        self.model.to(engine.device).eval().requires_grad_(False)
        self.start = {name: _on(engine.device, q) for name, q in inputs.quantized.items()}
        self.layers = dict(self.start)
        self.weights: dict[str, nn.Parameter] = {
            name: self.model.get_submodule(name).weight for name in self.layers
        }
        self.head = AnswerHead(self.model)
        if spec.gradient_checkpointing:
            recompute_blocks(self.model)
        self.history: list[dict[str, Any]] = []
        self._probe = self.loss.probe_rows()
        self._seen = 0  # tokens of this round
        self._taken: tuple[str, int] | None = None  # phase and batch of the last gradient
        self._gradients = _Gradients(self.weights)
        self.state = State(FLIPPING, 0, spec.flips.at_once, 0, 0, math.inf, ())

    def advance(self) -> dict[str, Any]:
        """Try one move and keep it or take it back; return the round's record."""
        began, self._seen = time.perf_counter(), 0
        if not self.state.round:
            self.state = self._started()
        flipping = self.state.phase == FLIPPING
        move = self._flips() if flipping else self._undoing()
        kept = self._try(move, strictly=flipping)
        record = self._record(flip_count(move), kept, time.perf_counter() - began)
        self.state = self._next(kept, flip_count(move))
        self.history.append(record)
        return record

    def _started(self) -> State:
        loss, means = self._probe_loss()
        if not math.isfinite(loss):
            raise DivergedError(f"the loss of Q0 is {loss}", remedy="check Q0 and the pairs")
        return replace(self.state, loss=loss, means=means)

    def _flips(self) -> Move:
        """Return the most promising flips, by the gradient on this round's rows."""
        room = self.spec.max_flips - self.changed
        self._take_gradient(self.loss.round_rows(self.state.batch))
        count = min(self.state.size, room)
        return greedy_move(self.layers, self.ladders, self._gradients.sums, count)

    def _undoing(self) -> Move:
        """Return the way back of the least useful flips, by the gradient on the probe rows."""
        self._take_gradient(self._probe)
        return undoing_move(self.layers, self.start, self._gradients.sums, self.state.size)

    def _try(self, move: Move, *, strictly: bool) -> bool:
        """Make a move; take it back unless the probe loss falls (or, not strictly, stays).

        A move that makes the loss infinite or NaN is taken back like any other.
        """
        before = self.layers
        self._put(move)
        loss, means = self._probe_loss()
        if loss < self.state.loss or (not strictly and loss == self.state.loss):
            self.state = replace(self.state, loss=loss, means=means)
            return True
        self.layers = before
        self._form(move)
        return False

    def _next(self, kept: bool, tried: int) -> State:
        """Return what comes after a round: other rows and more codes if it was kept, else fewer."""
        spec, state = self.spec, replace(self.state, round=self.state.round + 1)
        if kept:
            size = min(spec.at_once, math.ceil(1.5 * state.size))
            state = replace(state, size=size, batch=state.batch + 1, failed=0)
        else:
            state = replace(state, size=min(state.size, tried) // 2)
        if state.phase == FLIPPING:
            return self._next_flips(state)
        return state if state.size >= spec.at_least else replace(state, phase=DONE)

    def _next_flips(self, state: State) -> State:
        spec, changed = self.spec, self.changed
        least = min(spec.at_least, spec.at_once)
        if state.size < least:
            again = max(least, spec.at_once // 4)
            state = replace(state, size=again, batch=state.batch + 1, failed=state.failed + 1)
        if state.failed <= spec.patience and state.round < spec.rounds and changed < spec.max_flips:
            return state
        size = changed // 4 if spec.remove else 0
        return replace(state, phase=REMOVING if size >= spec.at_least else DONE, size=size)

    @property
    def changed(self) -> int:
        """How many codes differ from Q0's."""
        pairs = zip(self.layers.values(), self.start.values(), strict=True)
        return sum(int((new.codes != old.codes).sum()) for new, old in pairs)

    def _put(self, move: Move) -> None:
        moved = {
            name: QuantizedTensor(self.layers[name].grid, part.apply(self.layers[name].codes))
            for name, part in move.items()
        }
        self.layers = self.layers | moved
        self._form(move)

    def _form(self, names: Mapping[str, Any]) -> None:
        """Give the model the weights of the present codes of some layers."""
        for name in names:
            weight = self.weights[name]
            weight.data.copy_(self.layers[name].dense())

    def _take_gradient(self, rows: Sequence[int]) -> None:
        """Take the gradient on some rows, unless it was taken and no move was kept since."""
        asked = (self.state.phase, self.state.batch)
        if self._taken == asked:
            return
        self._taken = asked
        self._gradients.clear()
        self._pass(rows, backward=True)
        for total in self._gradients.sums.values():
            self.engine.all_reduce(total)

    def _probe_loss(self) -> tuple[float, tuple[float, ...]]:
        with torch.no_grad():
            means = self._pass(self._probe)
        # float32: the order in which workers' parts are added must not decide between equals.
        return float(self.loss.total(means).float()), tuple(means.tolist())

    def _pass(self, rows: Sequence[int], *, backward: bool = False) -> Tensor:
        """Run this rank's pieces of some rows; return the kinds' means over all ranks."""
        means = torch.zeros(len(self.loss.kinds), dtype=torch.float64, device=self.engine.device)
        for piece in self.loss.pieces(rows, self.engine.rank, self.engine.world_size):
            piece = piece.to(self.engine.device)
            logits = self.head.logits(self.model, piece.batch.ids, piece.batch.positions)
            part = self.loss.means(logits, piece)
            if backward:
                self.loss.total(part).backward()
            means += part.detach()
            self._seen += piece.batch.tokens
        return self.engine.all_reduce(means)

    def _record(self, tried: int, kept: bool, seconds: float) -> dict[str, Any]:
        flips = self.changed
        tokens = torch.tensor(float(self._seen), dtype=torch.float64, device=self.engine.device)
        return {
            "step": self.state.round + 1,
            "phase": self.state.phase,
            "tried": tried,
            "kept": kept,
            "loss": self.state.loss,
            "parts": dict(zip(self.loss.kinds, self.state.means, strict=True)),
            "flips": flips,
            "codes_changed": flips / sum(q.codes.numel() for q in self.layers.values()),
            "tokens": int(self.engine.all_reduce(tokens)),
            "seconds": round(seconds, 4),
        }

    def resume(self, folder: UPath) -> None:
        """Continue from the newest whole checkpoint in `folder`, if there is one."""
        found = same_checkpoint(self.engine, folder)
        if found is None:
            return
        tensors, meta = found
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            layer, _, part = key.rpartition("/")
            parts.setdefault(layer, {})[part] = tensor
        self._put({n: sparse_patch.unpack(packed, str(folder)) for n, packed in parts.items()})
        self.history = meta["history"]
        self.state = State(**meta["state"] | {"means": tuple(meta["state"]["means"])})

    def save(self, folder: UPath) -> None:
        """Write a checkpoint: the flips so far, a few kilobytes; only rank 0 writes."""
        if self.engine.rank:
            return
        tensors: dict[str, Tensor] = {}
        for name, old in self.start.items():
            packed = sparse_patch.diff(old.codes, self.layers[name].codes).pack()
            tensors |= {f"{name}/{part}": value for part, value in packed.items()}
        meta = {"state": vars(self.state), "history": self.history}
        patch_state.save(folder, self.state.round, tensors, meta)

    def write_results(self, folder: UPath) -> None:
        """Write what a finished patch leaves; only rank 0 writes."""
        if self.engine.rank:
            return
        layers = self.layers.items()
        changes = ((name, q.codes, q.dense() - self.start[name].dense()) for name, q in layers)
        write_changes(folder, changes)
        write_history(folder, self.history)


class _Gradients:
    """Sums of dL/dw over backward passes, layer by layer; one gradient buffer is there at a time.

    Sums are float64, so that how many workers add them up does not decide between two codes.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self.sums = {n: torch.zeros_like(w, dtype=torch.float64) for n, w in weights.items()}
        for name, weight in weights.items():
            weight.requires_grad_(True)
            weight.register_post_accumulate_grad_hook(partial(_collect, self.sums[name]))

    def clear(self) -> None:
        for total in self.sums.values():
            total.zero_()


def _collect(total: Tensor, weight: Tensor) -> None:
    if weight.grad is not None:
        total += weight.grad
    weight.grad = None


def _on(device: torch.device, layer: QuantizedTensor) -> QuantizedTensor:
    return QuantizedTensor(layer.grid.to(device), layer.codes.to(device))
