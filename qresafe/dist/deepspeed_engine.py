"""The patch loop's optimizer on DeepSpeed ZeRO, in a process group that already exists."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from qresafe.specs import PatchSpec
from qresafe.stages.train_engine import MOMENTS, adamw


class DeepSpeedEngine:
    """A `TrainEngine` over the default process group, with ZeRO stage 0 to 3.

    Checkpoints go through whole tensors, not through DeepSpeed's own files: those are pickles,
    and can only be loaded on the same number of processes.

    Args:
        device: This process's device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()

    def prepare(
        self, model: nn.Module, factors: Mapping[str, nn.Parameter], spec: PatchSpec
    ) -> Any:
        deepspeed = quiet_deepspeed()
        self._factors, self._stage = dict(factors), spec.zero_stage
        self._engine, *_ = deepspeed.initialize(
            model=model.to(self.device),
            optimizer=adamw(self._factors.values(), spec),
            config=deepspeed_config(spec, self.world_size),
            dist_init_required=False,
        )
        return self._engine

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over the ranks; the loop's losses are to be summed.
        self._engine.backward(loss * self.world_size)

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
        found: dict[str, Tensor] = {}
        for name, factor in self._factors.items():
            found[f"factor/{name}"] = self._read(factor, None)
            for moment in MOMENTS:
                found[f"{moment}/{name}"] = self._read(factor, moment)
        return found

    def load_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        if steps:
            self._make_moments(steps)
        for name, factor in self._factors.items():
            self._write(factor, state[f"factor/{name}"], None)
            for moment in MOMENTS if steps else ():
                self._write(factor, state[f"{moment}/{name}"], moment)

    def _read(self, factor: nn.Parameter, moment: str | None) -> Tensor:
        from deepspeed import utils

        if not self._stage:
            state = self._engine.optimizer.state[factor]
            return (state[moment] if moment else factor.detach()).clone()
        if moment is None:
            return utils.safe_get_full_fp32_param(factor)
        return utils.safe_get_full_optimizer_state(factor, moment)

    def _write(self, factor: nn.Parameter, value: Tensor, moment: str | None) -> None:
        from deepspeed import utils

        if moment is None:
            self._overwrite(factor, value)
        if not self._stage:
            if moment is not None:
                self._engine.optimizer.state[factor][moment].copy_(value)
        elif self._stage < 3:
            if moment is None:
                utils.safe_set_full_fp32_param(factor, value)
            else:
                utils.safe_set_full_optimizer_state(factor, value, moment)
        else:
            # The `full` variants of stage 3 overrun the last rank's padding; set the local piece.
            piece = self._local_piece(factor, value)
            if moment is None:
                utils.safe_set_local_fp32_param(factor, piece)
            else:
                utils.safe_set_local_optimizer_state(factor, piece, moment)

    def _overwrite(self, factor: nn.Parameter, value: Tensor) -> None:
        # The safe_set functions write the optimizer's copy only; forward passes read this one.
        if self._stage < 3:
            factor.data.copy_(value)
            return
        from deepspeed import zero

        with zero.GatheredParameters([factor], modifier_rank=0):
            if self.rank == 0:
                factor.data.copy_(value)

    def _local_piece(self, factor: nn.Parameter, value: Tensor) -> Tensor:
        size = factor.ds_tensor.numel()
        padded = value.new_zeros(size * self.world_size)
        padded[: value.numel()] = value.flatten()
        return padded[self.rank * size : (self.rank + 1) * size]

    def _make_moments(self, steps: int) -> None:
        """Create AdamW's state, which torch makes at the first step, with its step counter."""
        optimizer = self._engine.optimizer
        base = optimizer.optimizer if self._stage else optimizer
        for flat in self._flat_parameters():
            zeros = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            base.state[flat] = {"step": torch.tensor(float(steps)), **zeros}
        if self._stage in (1, 2):
            optimizer._lazy_init_hp_params_optimizer_state()

    def _flat_parameters(self) -> list[Tensor]:
        optimizer = self._engine.optimizer
        if not self._stage:
            return list(self._factors.values())
        if self._stage < 3:
            return list(optimizer.single_partition_of_fp32_groups)
        return list(optimizer.fp32_partitioned_groups_flat)


def deepspeed_config(spec: PatchSpec, world_size: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration; the loop itself owns micro-batches and the rate."""
    return {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": spec.max_grad_norm,
        "steps_per_print": 2**31,
        "zero_optimization": {"stage": spec.zero_stage},
    }


def quiet_deepspeed() -> Any:
    """Import DeepSpeed without its chatter and without compiling anything.

    On CPUs `init_distributed` would build a shared-memory operator with a C++ compiler (67 s on
    two cores) to speed up all-reduces; gloo does without.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.comm
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.logger.setLevel(logging.WARNING)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(torch.distributed.get_backend(), verbose=False)
    return deepspeed
