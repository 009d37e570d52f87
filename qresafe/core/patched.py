"""A quantized linear layer in training: what its codes and scales would be, if exported now.

`MaskedLoraLinear` moves codes, and scales along with them if asked to; `FrozenLinear` moves scales
alone, or nothing. Codes move on Q0's own grid and scales only decode them, so a code that has no
change is Q0's whatever its scale becomes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qresafe.core.blocks import row_blocks
from qresafe.core.grids import Grid, QuantizedTensor
from qresafe.core.latent import latent_offset
from qresafe.core.packed import pack_codes, unpack_codes
from qresafe.core.scales import rescaled, scale_of, sum_by_scale, unrounded_scale, with_scale

Factors = tuple[Tensor, Tensor]


class PatchedLinear(nn.Module, ABC):
    """A frozen quantized linear layer with a trainable change.

    Q0 lies in memory as codes at their own width; its decoded weight is kept beside them only
    where the forward pass does not round, and so adds to it.

    Args:
        quantized: Q0's grid and codes, (out, in).
        through_grid: Round in the forward pass, with a straight-through gradient.
        name: The layer's name in the model.
        bias: Of the linear layer that this replaces.
        dtype: Of the de-quantized weight and of the layer's output.
        latent: The weight from before it was rounded, (out, in), to start from; None: from Q0's.
        scale_rate: Train the scales too: their relative change is `scale_rate` times the trained
            `log_scale`, so that one optimizer's rate serves all; None: they stay. Needs
            `through_grid`.

    Raises:
        ModelError: `latent` does not round to Q0's codes, or the grid has no scales to train.
    """

    weight: Tensor  # (out, in), or empty where it is not kept: its dtype is the layer's
    packed: Tensor  # of `pack_codes`; a parameter, so that ZeRO-3 shards it
    log_scale: Tensor | None
    scaling: float  # of the factors' product, where there are factors

    def __init__(
        self,
        quantized: QuantizedTensor,
        *,
        through_grid: bool = True,
        name: str = "",
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
        latent: Tensor | None = None,
        scale_rate: float | None = None,
    ) -> None:
        super().__init__()
        where = f"layer {name!r}"
        self.out_features, self.in_features = self.shape = quantized.grid.shape
        self.through_grid, self.grid = through_grid, quantized.grid
        packed = pack_codes(quantized.codes, quantized.grid)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.offset = None if latent is None else latent_offset(quantized, latent, where)
        if through_grid:
            empty = torch.empty(0, dtype=dtype or quantized.grid.dtype, device=packed.device)
            self.register_buffer("weight", empty, persistent=False)
        else:
            start = quantized.dense() if latent is None else latent
            self.weight = nn.Parameter(start.to(dtype), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.scale_rate, self.log_scale = scale_rate, None
        if scale_rate is not None:
            scale = scale_of(quantized.grid, where)
            self.log_scale = nn.Parameter(torch.zeros_like(scale, dtype=torch.float32))

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that an optimizer is to move, by name."""
        named = dict(self.named_parameters(recurse=False))
        return {name: named[name] for name in ("A", "B", "log_scale") if name in named}

    def state(self) -> dict[str, Tensor]:
        """Return what re-masking changes besides `trained`, by name; masks are bool."""
        buffers = self.named_buffers(recurse=False)
        return {kind: buffer for kind, buffer in buffers if kind != "weight"}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned."""
        for kind, buffer in self.state().items():
            buffer.copy_(state[kind])

    @property
    def codes0(self) -> Tensor:
        """Q0's codes, as the grid's `code_shape` says."""
        return unpack_codes(self.packed, self.grid)

    @abstractmethod
    def _factors(self) -> Factors | None:
        """The factors (rank, in), (out, rank) as they act; None where no code moves."""

    def _weight_mask(self, rows: slice) -> Tensor | None:
        """The mask (rows, in) of some rows of the factors' product, if there is one."""
        return None

    def _product(self, factors: Factors, rows: slice) -> Tensor:
        """Return the factors' change of a block of rows, in at least float32."""
        A, B = factors
        mask = self._weight_mask(rows)
        change = (B[rows] * self.scaling) @ A
        change = change.to(torch.promote_types(change.dtype, torch.float32))
        return change if mask is None else change.mul_(mask)

    def effective_weight(self) -> Tensor:
        """Return Q (through the grid) or start + change (out, in), differentiable in `trained`."""
        formed: Tensor = _FormedWeight.apply(
            *(self._factors() or (None, None)), self.log_scale, self
        )
        return formed

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return how far the unrounded weight is from Q0's, (out, in), float32.

        That is M * (B A) alpha/rank, with a latent start its offset more, and with trained scales
        what they change of Q0's weight.
        """
        change = self._change()
        change = torch.zeros(self.shape, device=self.packed.device) if change is None else change
        if self.log_scale is None:
            return change
        scale = unrounded_scale(self.grid, self._log_change())
        wide = self.grid.to(dtype=torch.float32)
        codes = self.codes0
        moved = with_scale(wide, scale).decode(codes)
        return change.add_(moved.sub_(wide.decode(codes)))

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Return the codes of snap(Q0 + change), (out, in): what the export writes."""
        change = self._change()
        codes = self.codes0
        return codes if change is None else self.grid.move(codes, change)

    @torch.no_grad()
    def exported(self) -> QuantizedTensor:
        """Return codes and grid as the export writes them."""
        return QuantizedTensor(self._exported_grid(), self.codes())

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.effective_weight(), self.bias)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PatchedLinear:
        # Grid and offset are no buffers, because `model.bfloat16()` must not round them.
        super()._apply(fn, recurse)
        self.grid = self.grid.to(device=self.packed.device)
        if self.offset is not None:
            self.offset = self.offset.to(self.packed.device)
        return self

    def _log_change(self) -> Tensor:
        assert self.log_scale is not None
        return self.log_scale.detach() * self.scale_rate

    def _exported_grid(self) -> Grid:
        return self.grid if self.log_scale is None else rescaled(self.grid, self._log_change())

    def _change(self) -> Tensor | None:
        """Return what is added to decode(codes0) before rounding, (out, in); None: nothing."""
        factors = self._factors()
        if factors is None:
            return None
        change = self._product(factors, slice(None))
        return change if self.offset is None else change.add_(self.offset)

    def _form(self, factors: Factors | None, grid: Grid, rows: slice) -> Tensor:
        """Return a block of rows of the acting weight; `grid` is the one of the export."""
        grid = grid.rows(rows)
        codes = unpack_codes(self.packed[rows], grid)
        if factors is None:
            return grid.decode(codes)
        change = self._product(factors, rows)
        if not self.through_grid:
            return change.add_(self.weight[rows])
        if self.offset is not None:
            change.add_(self.offset[rows])
        if self.log_scale is None:
            return grid.snap_moved_(codes, change)
        return grid.decode(self.grid.rows(rows).move(codes, change))


class FrozenLinear(PatchedLinear):
    """No code moves: `trains: scales`, or without a `scale_rate` Q0 itself, decoded as it acts."""

    def _factors(self) -> Factors | None:
        return None

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, codes stay"


class _FormedWeight(torch.autograd.Function):
    """The acting weight, rounded or not, formed in cache-sized blocks of rows."""

    @staticmethod
    def forward(
        ctx: Any, A: Tensor | None, B: Tensor | None, log_scale: Tensor | None, layer: PatchedLinear
    ) -> Tensor:
        formed = torch.empty(layer.shape, dtype=layer.weight.dtype, device=layer.packed.device)
        grid = layer._exported_grid()
        factors = None if A is None or B is None else (A, B)
        for rows in row_blocks(*layer.shape, formed.device, layer.grid.row_step):
            block = layer._form(factors, grid, rows)
            formed[rows] = block
        kept = None if log_scale is None else formed
        ctx.save_for_backward(A, B, kept)
        ctx.layer = layer
        return formed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        A, B, formed = ctx.saved_tensors
        layer, gradient = ctx.layer, gradients[0].contiguous()
        scale = None
        if formed is not None:
            weighed = gradient.float() * formed.float()
            scale = sum_by_scale(layer.grid, weighed).mul_(layer.scale_rate)
            scale = scale.to(layer.log_scale.dtype)
        if A is None:
            return None, None, scale, None
        grad_A, grad_B = torch.zeros_like(A), torch.empty_like(B)
        for rows in row_blocks(B.shape[0], A.shape[1], gradient.device):
            part, mask = gradient[rows].to(A.dtype), layer._weight_mask(rows)
            part = part if mask is None else part * mask
            grad_B[rows] = part @ A.T
            grad_A.addmm_(B[rows].T, part)
        return grad_A.mul_(layer.scaling), grad_B.mul_(layer.scaling), scale, None
