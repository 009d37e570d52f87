"""What the patch loop asks of an optimizer and its processes, and the plain torch answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qresafe.specs import PatchSpec

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state, in torch's names


class TrainEngine(Protocol):
    """One of `world_size` processes that train the same factors.

    All methods but the attributes are collective: every rank calls them in the same order.

    Attributes:
        rank: This process, 0 to world_size - 1.
        world_size: How many processes take part.
        device: Where this process computes.
        independent: Whether `backward` and forward passes are this process's alone, so that it
            may repeat them.
    """

    rank: int
    world_size: int
    device: torch.device
    independent: bool

    def prepare(
        self, model: nn.Module, factors: Mapping[str, nn.Parameter], spec: PatchSpec
    ) -> Any:
        """Take over `model` and return what to call for forward passes.

        Args:
            model: Q0 with masked factors; only `factors` require a gradient.
            factors: Name -> trainable parameter, float32.
            spec: Learning rate, weight decay, clipping and ZeRO stage.
        """

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`; contributions of micro-batches and ranks are *summed*.

        Args:
            loss: Scalar: this micro-batch's part of the global loss.
            last: Whether it is the step's last micro-batch.
        """

    def forget(self) -> None:
        """Clear the gradients added since the last step; not collective."""

    def step(self, lr: float) -> float:
        """Clip, update the factors, clear the gradients; return the norm before clipping."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over the ranks, in place, and return it."""

    def gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
        """Make sharded parameters readable in full within the block."""

    def state(self) -> dict[str, Tensor]:
        """Return factors ("factor/<name>") and AdamW's moments ("exp_avg/<name>", ...) in full."""

    def load_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Put back what `state` returned after `steps` optimizer steps."""


def adamw(factors: Iterable[nn.Parameter], spec: PatchSpec) -> torch.optim.AdamW:
    """Return the one optimizer of all engines; the loop sets its rate at every step."""
    return torch.optim.AdamW(list(factors), lr=spec.lr, weight_decay=spec.weight_decay)


class LocalEngine:
    """Everything in this process, on one device, without DeepSpeed or Ray.

    Args:
        device: A torch device.
    """

    rank = 0
    world_size = 1
    independent = True

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)

    def prepare(
        self, model: nn.Module, factors: Mapping[str, nn.Parameter], spec: PatchSpec
    ) -> Any:
        self._factors, self._max_norm = dict(factors), spec.max_grad_norm
        model.to(self.device)
        self._optimizer = adamw(self._factors.values(), spec)
        return model

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def forget(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def step(self, lr: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        norm = nn.utils.clip_grad_norm_(self._factors.values(), self._max_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def gathered(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
        return nullcontext()

    def state(self) -> dict[str, Tensor]:
        found = {f"factor/{name}": factor.detach() for name, factor in self._factors.items()}
        for name, factor in self._factors.items():
            for moment in MOMENTS:
                value = self._optimizer.state[factor].get(moment, torch.zeros_like(factor))
                found[f"{moment}/{name}"] = value
        return found

    def load_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        for name, factor in self._factors.items():
            factor.data.copy_(state[f"factor/{name}"])
            if steps:
                moments = {m: state[f"{m}/{name}"].to(factor, copy=True) for m in MOMENTS}
                self._optimizer.state[factor] = {"step": torch.tensor(float(steps)), **moments}
