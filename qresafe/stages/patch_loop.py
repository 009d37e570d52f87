"""The patch's training loop: masked factors, named loss terms, re-masking, checkpoints.

Whatever happens in step t depends on the spec, the pool and the state after step t - 1 alone: a
run that was killed and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from upath import UPath

from qresafe import metrics
from qresafe.core.grids import QuantizedTensor
from qresafe.core.masked_lora import MaskedLoraLinear, attach, attach_frozen
from qresafe.core.masks import pack_bits, unpack_bits
from qresafe.core.objectives import objective
from qresafe.core.patched import PatchedLinear
from qresafe.errors import DivergedError, OutOfMemoryError, ResourceError
from qresafe.failure import is_out_of_memory
from qresafe.hf.answer_head import AnswerHead
from qresafe.hf.half import scale_gradients
from qresafe.hf.recompute import recompute_blocks
from qresafe.process_log import log
from qresafe.progress import Progress
from qresafe.specs import PatchSpec
from qresafe.stages import patch_state
from qresafe.stages.patch_data import Pool, batch_at, collate, share, total_steps
from qresafe.stages.patch_loss import term_losses
from qresafe.stages.patch_mask import MaskRows, mask_rows, renew_masks
from qresafe.stages.patch_output import (
    as_exported,
    codes_changed,
    scales_changed,
    write_results,
)
from qresafe.stages.runtime import record_gpu
from qresafe.stages.train_engine import TrainEngine

Accumulated = tuple[float, dict[str, float], int]  # loss, its terms, tokens


@dataclass(frozen=True)
class PatchInputs:
    """What a patch starts from.

    Attributes:
        model: Q0 with plain linear layers, decoded or as `load_frame` leaves it; changed in place.
        quantized: Module name -> grid and codes; may read them on access.
        pool: The training rows.
        latents: Module name -> the weight that was rounded to `quantized`, to start from; None:
            from `quantized`.
    """

    model: Any
    quantized: Mapping[str, QuantizedTensor]
    pool: Pool
    latents: Mapping[str, Tensor] | None = None


def train_patch(
    engine: TrainEngine,
    inputs: PatchInputs,
    spec: PatchSpec,
    folder: UPath,
    progress: Progress,
    watch: Watch | None = None,
) -> None:
    """Train a patch, or continue the one that `folder` holds a checkpoint of.

    Leaves adapter.safetensors, codes.safetensors, delta.safetensors, history.jsonl and what else
    `patch_output` says in `folder`.

    Args:
        engine: This process's part of the optimizer; every rank calls this function.
        inputs: The same on every rank.
        spec: All hyper-parameters.
        folder: Shared between the ranks; checkpoints go to its `work/checkpoints`.
        progress: Advances by steps.
        watch: Looks at the model every so many steps; it changes no trained bit.

    Raises:
        DivergedError: The loss or gradient is not finite; the last good checkpoint stays.
        OutOfMemoryError: Half a micro-batch does not fit either; the last checkpoint stays.
        ResourceError: The ranks do not see the same folder.
    """
    loop = PatchLoop(engine, inputs, spec)
    loop.resume(folder)
    progress.advance(loop.step, "resumed" if loop.step else "")
    seen = [record for record in loop.history if "probe" in record]
    while loop.step < loop.steps:
        record = loop.advance()
        _tell(record, engine.rank, folder)
        progress.advance(1, f"loss {record['loss']:.4f}")
        if watch and loop.step % watch.every == 0:
            record["probe"] = loop.look(watch)
            seen.append(record)
        if loop.step % spec.checkpoint_every == 0 or loop.step == loop.steps:
            loop.save(folder)
        while watch and seen:  # once it is saved: who is told may end this process
            watch.tell(seen.pop(0))
    loop.history[-1]["codes_changed"] = codes_changed(engine, loop.layers)
    if spec.trains != "codes":
        loop.history[-1]["scales_changed"] = scales_changed(engine, loop.layers)
    write_results(engine, loop.layers, loop.history, folder)


def _tell(record: Mapping[str, Any], rank: int, folder: UPath) -> None:
    """Record a step's figures; what is equal on all ranks is told by one."""
    told = "step %d: loss %.4f, %d tokens, %.2f s"
    log.info(told, record["step"], record["loss"], record["tokens"], record["seconds"])
    labels = metrics.place(folder) | {"rank": str(rank)}
    metrics.record("qresafe_step_seconds", record["seconds"], labels)
    record_gpu(labels)
    if rank == 0:
        metrics.record("qresafe_steps", 1, labels)
        metrics.record("qresafe_loss", record["loss"], labels)
        metrics.record("qresafe_trained_tokens", record["tokens"], labels)


def patched_layers(inputs: PatchInputs, spec: PatchSpec) -> Mapping[str, PatchedLinear]:
    """Replace Q0's quantized layers by ones that train what `spec` says; see `attach`."""
    rate = None if spec.trains == "codes" else spec.scale_lr / spec.lr
    if spec.trains == "scales" and rate is not None:
        return attach_frozen(inputs.model, inputs.quantized, rate)
    return attach(
        inputs.model,
        inputs.quantized,
        rank=spec.rank,
        alpha=spec.alpha,
        on=spec.mask.on,
        through_grid=spec.through_grid,
        seed=spec.seed,
        latents=inputs.latents,
        scale_rate=rate,
    )


class Watch(Protocol):
    """Looks at a model in training.

    Attributes:
        every: How many steps lie between two looks.
    """

    every: int

    def look(self, model: Any) -> dict[str, Any]:
        """Return JSON-able figures of the model; every rank looks, and sees the same."""

    def tell(self, record: Mapping[str, Any]) -> None:
        """Hear of a step's record with its `probe`; after a restart, of earlier ones again."""


class PatchLoop:
    """The state of one rank: layers, optimizer, step counter, masks, history."""

    def __init__(self, engine: TrainEngine, inputs: PatchInputs, spec: PatchSpec) -> None:
        self.engine, self.pool, self.spec = engine, inputs.pool, spec
        self.model = inputs.model
        self.layers = patched_layers(inputs, spec)
        factors = {
            f"{name}.{kind}": parameter
            for name, layer in self.layers.items()
            for kind, parameter in layer.trained.items()
        }
        self.loss_scale = scale_gradients(self.model, factors.values())
        self.head = AnswerHead(self.model)
        if spec.gradient_checkpointing:
            recompute_blocks(self.model)
        self.forward = engine.prepare(self.model, factors, spec)
        self.model.eval()  # no dropout: the reference log-probs were taken without
        self.steps = total_steps(len(self.pool), spec)
        self.micro, self.halved = spec.micro_batch_size, False
        self.step = self.mask_version = 0
        self.history: list[dict[str, Any]] = []
        layers = self.layers.items()
        self._masked = {name: one for name, one in layers if isinstance(one, MaskedLoraLinear)}
        self._mask_rows = mask_rows(self.pool, spec) if self._masked else MaskRows()

    def advance(self) -> dict[str, Any]:
        """Do one optimizer step, after a re-masking where it is due; return its record."""
        began = time.perf_counter()
        record: dict[str, Any] = {"step": self.step + 1}
        if self._mask_due():
            record["mask"] = self._remask()
        lr = learning_rate(self.step, self.spec)
        loss, parts, tokens = self._in_memory(self._accumulate)
        record |= {"loss": loss, "parts": parts, "lr": lr, "tokens": tokens}
        self._require_finite("loss", loss)
        record["grad_norm"] = self.engine.step(lr)
        self._require_finite("gradient", record["grad_norm"])
        record["seconds"] = round(time.perf_counter() - began, 4)
        self.step += 1
        self.history.append(record)
        return record

    def look(self, watch: Watch) -> dict[str, Any]:
        """Let `watch` look at the model as its export would be."""
        with as_exported(self.engine, self.layers):
            return watch.look(self.model)

    def resume(self, folder: UPath) -> None:
        """Continue from the newest whole checkpoint in `folder`, if there is one."""
        found = same_checkpoint(self.engine, folder)
        if found is None:
            return
        tensors, meta = found
        self.step, self.history = meta["step"], meta["history"]
        self.mask_version = meta["mask_version"]
        self.engine.load_state(tensors, self.step)
        for name, layer in self.layers.items():
            layer.restore(
                {
                    kind: _unpacked(tensors[f"buffer/{name}.{kind}"], now)
                    for kind, now in layer.state().items()
                }
            )

    def save(self, folder: UPath) -> None:
        """Write a checkpoint; collective, but only rank 0 writes."""
        tensors = dict(self.engine.state())
        if self.engine.rank:
            return
        for name, layer in self.layers.items():
            for kind, value in layer.state().items():
                tensors[f"buffer/{name}.{kind}"] = _packed(value)
        meta = {
            "mask_version": self.mask_version,
            "world_size": self.engine.world_size,
            "history": self.history,
        }
        patch_state.save(folder, self.step, tensors, meta)

    def _in_memory(self, accumulate: Callable[[], Accumulated]) -> Accumulated:
        """Add up a gradient; where memory runs out, once more in half the pieces.

        The gradient is that of the whole batch either way; only its rounding differs.
        """
        try:
            return accumulate()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler: the error's traceback would keep the tensors alive.
        if self.micro == 1 or self.halved or not self.engine.independent:
            raise self._out_of_memory()
        self.engine.forget()
        self.micro, self.halved = (self.micro + 1) // 2, True
        try:
            return accumulate()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        raise self._out_of_memory()

    def _out_of_memory(self) -> OutOfMemoryError:
        what = f"out of memory at step {self.step + 1}, {self.micro} rows at a time"
        remedy = "lower patch.micro_batch_size, or use more memory; checkpoints so far are kept"
        return OutOfMemoryError(what, remedy=remedy)

    def _accumulate(self) -> Accumulated:
        """Add up the gradient of one global batch; return its loss, the terms and tokens."""
        engine, spec = self.engine, self.spec
        indices = batch_at(len(self.pool), spec.batch_size, spec.seed, self.step)
        counts = self.pool.counts(indices)
        beta = changed(spec.objective.beta, "beta", self.step, spec)
        shares = share(
            indices,
            self.pool.lengths,
            rank=engine.rank,
            world_size=engine.world_size,
            micro=self.micro,
        )
        sums = torch.zeros(2 + len(counts), dtype=torch.float64)
        for number, mine in enumerate(shares):
            # An empty share still takes part in collectives, with a row that does not count.
            rows = self.pool.rows(mine or indices[:1])
            batch = collate(rows, spec.objective.kl_tokens).to(engine.device)
            logits = self.head.logits(self.forward, batch.ids, batch.positions)
            losses = term_losses(logits, batch, beta)
            loss, parts = objective(losses, self.pool.weights, counts)
            engine.backward(loss * self.loss_scale * bool(mine), last=number == len(shares) - 1)
            if mine:
                shown = [parts.get(name, 0.0) for name in counts]
                seen = [float(loss.detach()), batch.tokens, *shown]
                sums += torch.tensor(seen, dtype=torch.float64)
        loss_sum, tokens, *terms = engine.all_reduce(sums.to(engine.device)).tolist()
        parts = {
            name: mean for (name, rows), mean in zip(counts.items(), terms, strict=True) if rows
        }
        return loss_sum, parts, int(tokens)

    def _mask_due(self) -> bool:
        every = self.spec.mask.remask_every
        due = self.step == 0 or (every > 0 and self.step % every == 0)
        return due and bool(self._masked)

    def _remask(self) -> dict[str, Any]:
        changed = codes_changed(self.engine, self.layers)
        self.mask_version += 1
        report = renew_masks(
            self.engine,
            self.model,
            self.head,
            self._masked,
            self._mask_rows,
            self.spec,
            self.mask_version,
        )
        return {
            "version": report.version,
            "overlap": report.overlap if report.version > 1 else None,  # there was none before
            "active": sum(report.active.values()) / max(1, sum(report.total.values())),
            "codes_changed": changed,
        }

    def _require_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            remedy = "lower patch.lr, or raise patch.warmup_steps; checkpoints so far are kept"
            raise DivergedError(f"the {what} is {value} at step {self.step + 1}", remedy=remedy)


def _packed(value: Tensor) -> Tensor:
    """Return a mask as bits; an anchor or a reference as it is."""
    return pack_bits(value) if value.dtype == torch.bool else value


def _unpacked(stored: Tensor, like: Tensor) -> Tensor:
    return unpack_bits(stored, tuple(like.shape)) if like.dtype == torch.bool else stored


def same_checkpoint(
    engine: TrainEngine, folder: UPath
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return (tensors, meta) of the newest whole checkpoint, after seeing that all ranks see it.

    Raises:
        ResourceError: They do not see the same folder.
    """
    found = patch_state.load(folder, engine.device)
    step = found[1]["step"] if found else 0
    seen = engine.all_reduce(torch.tensor(float(step), device=engine.device))
    if float(seen) != step * engine.world_size:
        remedy = "use a storage that all workers share"
        raise ResourceError("workers see different checkpoints", where=str(folder), remedy=remedy)
    return found


def learning_rate(step: int, spec: PatchSpec) -> float:
    """Return the rate of step `step` (from 0): linear warm-up, then constant between changes."""
    return changed(spec.lr, "lr", step, spec) * min(1.0, (step + 1) / max(1, spec.warmup_steps))


def changed(start: float, name: str, step: int, spec: PatchSpec) -> float:
    """Return what `patch.changes` has made of a value by step `step` (from 0)."""
    for change in sorted(spec.changes, key=lambda change: change.at):
        value = getattr(change, name)
        if change.at <= step and value is not None:
            start = value
    return start
