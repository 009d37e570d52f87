"""The patched layer: Q = snap(Q0 + M * (B A) alpha/rank), paper Eq. 2.

With latent weights at hand, Q = snap(latent + M * (B A) alpha/rank): where nothing changes these
are Q0's codes too, see `qresafe.core.latent`.

Paper notation: A in R^(in x r) and B in R^(r x out); here, as in PEFT, A is (rank, in) and
B is (out, rank), so that the change of a weight (out, in) is B A.

Two kinds of mask (DESIGN section 4, point 1):
- "weight": M is (out, in), exactly Eq. 2; a weight outside M does not move at all.
- "factors": a mask over A's input columns and one over B's output rows (Algorithm 1's M_A, M_B);
  an entry of a factor outside its mask does not move. The forward pass stays plain LoRA.

Neither writes into a parameter or the optimizer's state, so what they promise holds by
construction for every optimizer, with momentum and weight decay, and under ZeRO-1/2/3.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qresafe.core.blocks import keyed_generator
from qresafe.core.grids import QuantizedTensor
from qresafe.core.masks import pack_rows, unpack_rows
from qresafe.core.patched import Factors, FrozenLinear, PatchedLinear
from qresafe.errors import ModelError, nearest

Layer = TypeVar("Layer", bound=PatchedLinear)
Masks = tuple[Tensor, ...]  # (M,) of "weight"; (M_A over inputs, M_B over outputs) of "factors"


class MaskedLoraLinear(PatchedLinear, ABC):
    """A frozen quantized linear layer with a trainable, masked low-rank change.

    Args:
        quantized: Q0's grid and codes, (out, in).
        rank: r of the factors.
        alpha: The change is scaled by alpha / rank.
        seed: Of A's start values, together with `name`; B starts at 0, so Q starts at Q0.
        name: The layer's name in the model.
        options: Of `PatchedLinear`.
    """

    def __init__(
        self,
        quantized: QuantizedTensor,
        *,
        rank: int,
        alpha: float,
        seed: int = 0,
        name: str = "",
        **options: Any,
    ) -> None:
        super().__init__(quantized, name=name, **options)
        device = self.packed.device
        self.rank, self.scaling = rank, alpha / rank
        start = torch.randn(rank, self.in_features, generator=keyed_generator(seed, name))
        self.A = nn.Parameter((start / math.sqrt(self.in_features)).to(device))
        self.B = nn.Parameter(torch.zeros(self.out_features, rank, device=device))

    @property
    @abstractmethod
    def masks(self) -> Masks:
        """The bool masks: (M,) or (M_A, M_B)."""

    @abstractmethod
    def set_masks(self, masks: Masks) -> None:
        """Start to use new masks of the same shapes; what may move changes from here on."""

    @abstractmethod
    def _factors(self) -> Factors: ...

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, rank={self.rank}"


class WeightMaskedLinear(MaskedLoraLinear):
    """`mask.on: weight`: Q = snap(start + M * (B A)); the change outside M is exactly 0.

    The mask lies in memory with 1 bit per weight and is unpacked block by block where it acts.
    """

    mask_bits: Tensor  # (out, ceil(in / 8))

    def __init__(self, quantized: QuantizedTensor, **options: Any) -> None:
        super().__init__(quantized, **options)
        ones = torch.ones(self.shape, dtype=torch.bool, device=self.packed.device)
        self.register_buffer("mask_bits", pack_rows(ones))

    @property
    def mask(self) -> Tensor:
        """M (out, in), bool: a copy."""
        return unpack_rows(self.mask_bits, self.in_features)

    @property
    def masks(self) -> Masks:
        return (self.mask,)

    def set_masks(self, masks: Masks) -> None:
        (mask,) = masks
        self.mask_bits.copy_(pack_rows(mask))

    def state(self) -> dict[str, Tensor]:
        return {"mask": self.mask}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.set_masks((state["mask"],))

    def _factors(self) -> Factors:
        return self.A, self.B

    def _weight_mask(self, rows: slice) -> Tensor | None:
        return unpack_rows(self.mask_bits[rows], self.in_features)


class FactorMaskedLinear(MaskedLoraLinear):
    """`mask.on: factors`: columns of A and rows of B outside the masks stay as they were.

    The optimizer moves A freely; what acts is `anchor + (A - ref)` inside the mask and `anchor`
    outside. Re-masking sets anchor to what acts now and ref to A, so that nothing jumps there.
    """

    mask_in: Tensor
    mask_out: Tensor
    A_anchor: Tensor
    A_ref: Tensor
    B_anchor: Tensor
    B_ref: Tensor

    def __init__(self, quantized: QuantizedTensor, **options: Any) -> None:
        super().__init__(quantized, **options)
        device = self.packed.device
        for name, size in (("mask_in", self.in_features), ("mask_out", self.out_features)):
            self.register_buffer(name, torch.ones(size, dtype=torch.bool, device=device))
        for name, factor in (("A", self.A), ("B", self.B)):
            self.register_buffer(f"{name}_anchor", factor.detach().clone())
            self.register_buffer(f"{name}_ref", factor.detach().clone())

    @property
    def masks(self) -> Masks:
        return (self.mask_in, self.mask_out)

    @torch.no_grad()
    def set_masks(self, masks: Masks) -> None:
        A, B = self._factors()
        self.A_anchor.copy_(A)
        self.B_anchor.copy_(B)
        self.A_ref.copy_(self.A)
        self.B_ref.copy_(self.B)
        for mine, mask in zip(self.masks, masks, strict=True):
            mine.copy_(mask)

    def _factors(self) -> Factors:
        inside_A = self.A_anchor + (self.A - self.A_ref)
        inside_B = self.B_anchor + (self.B - self.B_ref)
        return (
            torch.where(self.mask_in, inside_A, self.A_anchor),
            torch.where(self.mask_out[:, None], inside_B, self.B_anchor),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        if self.through_grid:
            return super().forward(inputs)
        A, B = self._factors()
        low_rank = F.linear(inputs.to(A.dtype), A)
        change = F.linear(low_rank, B * self.scaling)
        return F.linear(inputs, self.weight, self.bias) + change.to(inputs.dtype)


KINDS: dict[str, type[MaskedLoraLinear]] = {
    "weight": WeightMaskedLinear,
    "factors": FactorMaskedLinear,
}


def attach(
    model: nn.Module,
    quantized: Mapping[str, QuantizedTensor],
    *,
    rank: int,
    alpha: float,
    on: Literal["weight", "factors"],
    through_grid: bool,
    seed: int,
    latents: Mapping[str, Tensor] | None = None,
    scale_rate: float | None = None,
) -> dict[str, MaskedLoraLinear]:
    """Replace the named linear layers by patched ones, and freeze all but what they train.

    Args:
        model: Q0 with plain `nn.Linear` modules, whose weights count for nothing in the named
            layers; changed in place.
        quantized: Module name -> its grid and codes; may read them on access.
        rank: r of the factors.
        alpha: The change is scaled by alpha / rank.
        on: What the mask is over.
        through_grid: Train with rounding in the forward pass.
        seed: Of A's start values; they depend on it and on the layer's name alone.
        latents: Module name -> its weight from before it was rounded, to start from; may read it
            on access.
        scale_rate: Train the scales too, see `PatchedLinear`; None: they stay.

    Returns:
        Module name -> its patched layer, in the order of `quantized`.

    Raises:
        ModelError: A name is not a linear layer of the model, or has another shape; its latent
            weight does not round to its codes, or its grid has no scales to train.
    """

    def make(name: str, tensor: QuantizedTensor, **shared: Any) -> MaskedLoraLinear:
        latent = latents[name] if latents is not None else None
        shared |= {"name": name, "latent": latent, "scale_rate": scale_rate}
        own = {"rank": rank, "alpha": alpha, "seed": seed}
        return KINDS[on](tensor, through_grid=through_grid, **shared | own)

    return _replace(model, quantized, make)


def attach_frozen(
    model: nn.Module, quantized: Mapping[str, QuantizedTensor], scale_rate: float | None = None
) -> dict[str, FrozenLinear]:
    """Replace the named linear layers by ones whose codes stay; see `attach`.

    Args:
        model: As in `attach`.
        quantized: As in `attach`.
        scale_rate: Train the scales, see `PatchedLinear`; None: nothing is trained.

    Raises:
        ModelError: A name is not a linear layer of the model, or has another shape, or its grid
            has no scales to train.
    """

    def make(name: str, tensor: QuantizedTensor, **shared: Any) -> FrozenLinear:
        return FrozenLinear(tensor, name=name, scale_rate=scale_rate, **shared)

    return _replace(model, quantized, make)


def _replace(
    model: nn.Module, quantized: Mapping[str, QuantizedTensor], make: Callable[..., Layer]
) -> dict[str, Layer]:
    modules = dict(model.named_modules())
    model.requires_grad_(False)
    layers: dict[str, Layer] = {}
    for name, tensor in quantized.items():
        _check(name, tensor, modules)
        linear = modules[name]
        made = make(name, tensor, bias=linear.bias, dtype=linear.weight.dtype)
        layers[name] = made.to(linear.weight.device)
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, layers[name])
    return layers


def _check(name: str, tensor: QuantizedTensor, modules: Mapping[str, nn.Module]) -> None:
    linear = modules.get(name)
    if not isinstance(linear, nn.Linear):
        known = [n for n, m in modules.items() if isinstance(m, nn.Linear)]
        raise ModelError(
            f"no linear layer {name!r}", where="the model", remedy=nearest(name, known)
        )
    if tuple(linear.weight.shape) != tensor.grid.shape:
        shapes = f"a {tensor.grid.shape} grid for a {tuple(linear.weight.shape)} weight"
        remedy = "use the quantized checkpoint of this very model"
        raise ModelError(shapes, where=f"layer {name!r}", remedy=remedy)
