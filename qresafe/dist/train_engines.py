"""The patch loop's optimizer over several processes, in a process group that already exists."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from qresafe.specs import PatchSpec
from qresafe.stages.train_engine import MOMENTS, LocalEngine, TrainEngine, adamw

STATE = ("factor", *MOMENTS)


class ReplicatedEngine(LocalEngine):
    """`zero_stage: 0`: every rank holds everything, gradients are summed; needs no DeepSpeed.

    Args:
        device: This process's device.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(str(device))
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()

    def step(self, lr: float) -> float:
        factors = list(self._factors.values())
        flat = torch.cat([_gradient(factor).flatten() for factor in factors])
        self.all_reduce(flat)
        for factor, piece in zip(factors, flat.split([f.numel() for f in factors]), strict=True):
            factor.grad = piece.view_as(factor)
        return super().step(lr)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        torch.distributed.all_reduce(tensor)
        return tensor


class DeepSpeedEngine:
    """A `TrainEngine` over the default process group, with ZeRO stage 1 to 3.

    Checkpoints go through whole tensors, not through DeepSpeed's own files: those are pickles,
    and can only be loaded on the same number of processes.

    Args:
        device: This process's device.
    """

    independent = False  # shards are gathered in every pass

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()

    def prepare(
        self, model: nn.Module, factors: Mapping[str, nn.Parameter], spec: PatchSpec
    ) -> Any:
        deepspeed = quiet_deepspeed()
        config = deepspeed_config(spec, self.world_size)
        self._factors, self._stage = dict(factors), spec.zero_stage
        if self._stage == 3:  # weight by weight: the model need not fit on the device
            deepspeed.zero.Init(module=model, config_dict_or_path=config, dtype=torch.float32)
        self._engine, *_ = deepspeed.initialize(
            model=model.to(self.device),
            optimizer=adamw(self._factors.values(), spec),
            config=config,
            dist_init_required=False,
        )
        return self._engine

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over the ranks; the loop's losses are to be summed.
        self._engine.backward(loss * self.world_size)

    def forget(self) -> None:
        self._engine.zero_grad()

    def step(self, lr: float) -> float:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def all_reduce(self, tensor: Tensor) -> Tensor:
        torch.distributed.all_reduce(tensor)
        return tensor

    def gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
        if self._stage < 3:
            return nullcontext()
        from deepspeed import zero

        # Read only: nothing is scattered back.
        gathered: AbstractContextManager[Any] = zero.GatheredParameters(list(parameters))
        return gathered

    def state(self) -> dict[str, Tensor]:
        from deepspeed import utils

        found: dict[str, Tensor] = {}
        for name, factor in self._factors.items():
            found[f"factor/{name}"] = utils.safe_get_full_fp32_param(factor)
            for moment in MOMENTS:
                found[f"{moment}/{name}"] = utils.safe_get_full_optimizer_state(factor, moment)
        return found

    def load_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        from deepspeed import utils

        self._make_moments(steps)
        for name, factor in self._factors.items():
            self._overwrite(factor, state[f"factor/{name}"])
            pieces = {key: self._piece(factor, state[f"{key}/{name}"]) for key in STATE}
            if self._stage == 3:
                utils.safe_set_local_fp32_param(factor, pieces["factor"])
            else:
                utils.safe_set_full_fp32_param(factor, pieces["factor"])
            for moment in MOMENTS:
                if self._stage == 3:
                    utils.safe_set_local_optimizer_state(factor, pieces[moment], moment)
                else:
                    utils.safe_set_full_optimizer_state(factor, pieces[moment], moment)

    def _overwrite(self, factor: nn.Parameter, value: Tensor) -> None:
        # The safe_set functions write the optimizer's copy only; forward passes read this one.
        if self._stage < 3:
            factor.data.copy_(value)
            return
        from deepspeed import zero

        with zero.GatheredParameters([factor], modifier_rank=0):
            if self.rank == 0:
                factor.data.copy_(value)

    def _piece(self, factor: nn.Parameter, value: Tensor) -> Tensor:
        """Return what safe_set takes: all of `value`, or under ZeRO-3 this rank's part.

        There the `full` functions overrun the padding of the last rank's part.
        """
        if self._stage < 3:
            return value
        size = factor.ds_tensor.numel()
        padded = value.new_zeros(size * self.world_size)
        padded[: value.numel()] = value.flatten()
        return padded[self.rank * size : (self.rank + 1) * size]

    def _make_moments(self, steps: int) -> None:
        """Create AdamW's state, which torch makes at the first step, with its step counter."""
        zero = self._engine.optimizer
        if self._stage == 3:
            flats = zero.fp32_partitioned_groups_flat
        else:
            flats = zero.single_partition_of_fp32_groups
        for flat in flats:
            zeros = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            zero.optimizer.state[flat] = {"step": torch.tensor(float(steps)), **zeros}
        if self._stage < 3:
            zero._lazy_init_hp_params_optimizer_state()  # what the first step would do


def deepspeed_config(spec: PatchSpec, world_size: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration; the loop itself owns micro-batches and the rate."""
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    moved = {"none": (), "optimizer": ("optimizer",), "parameters": ("optimizer", "param")}
    offload = {f"offload_{what}": dict(host) for what in moved[spec.offload]}
    return {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": spec.max_grad_norm,
        "steps_per_print": 2**31,
        "zero_optimization": {"stage": spec.zero_stage} | offload,
        "zero_force_ds_cpu_optimizer": False,  # its own would be compiled; torch's AdamW it is
    }


def quiet_deepspeed() -> Any:
    """Import DeepSpeed without its chatter and without compiling anything.

    On CPUs `init_distributed` would build a shared-memory operator with a C++ compiler (67 s on
    two cores) to speed up all-reduces; gloo does without.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    import deepspeed.ops

    deepspeed.logger.setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_muon()
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(torch.distributed.get_backend(), verbose=False)
    return deepspeed


def _import_muon() -> None:
    """Import DeepSpeed's Muon optimizer, which it looks for at every start, without inductor.

    Its decorators would load torch's compiler: 3 s for an optimizer that is not used.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before


def _gradient(factor: nn.Parameter) -> Tensor:
    return torch.zeros_like(factor) if factor.grad is None else factor.grad


def make_engine(device: torch.device, zero_stage: int) -> TrainEngine:
    """Return this rank's engine for a ZeRO stage from 0 to 3."""
    return DeepSpeedEngine(device) if zero_stage else ReplicatedEngine(device)
