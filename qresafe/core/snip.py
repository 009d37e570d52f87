"""SNIP scores of quantized weights, paper Eq. 3: I(W_ij, x) = |W_ij * dL(x)/dQ_ij|.

The absolute value is taken sample by sample, then averaged over D_calib, so a batch gradient will
not do. Yet one backward pass per batch suffices: a linear layer's weight gradient is the sum over
samples b of delta_b^T x_b, with x its input and delta the gradient of its output. Hooks catch
both, form each sample's product in blocks of rows that stay in cache, and add up its absolute
values. |W_ij| does not depend on the sample and is multiplied in at the end.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qresafe.core.blocks import row_blocks
from qresafe.errors import ModelError, ResourceError


class SnipScorer:
    """Adds up |delta_b^T x_b| of linear layers over the backward passes within a `with` block.

    The caller's loss must be a SUM over samples (a mean would scale them by the batch size), with
    samples along the first dimension of the layers' inputs, or as `batch` was told. Layers may be
    `nn.Linear` or have an `effective_weight()`, and each is called once per forward pass. Their
    parameters need no gradient inside the block, so no gradient buffer is made.

    Memory: one block of a layer's gradient; the sums live in unlinked temporary files that the
    kernel writes back as it likes, unless all of them are smaller than `keep_bytes`.

    Args:
        layers: Name -> layer.
        folder: Of the temporary files; None: the system's.
        keep_bytes: Up to this size all sums together stay in memory, on the layer's device.
        rows_per_sample: Rows of a batch that make one sample, e.g. 2 where L(x) compares two
            answers: of n samples, rows s, s + n, ... belong to sample s, and are summed before
            the absolute value is taken.

    Raises:
        ResourceError: The folder has too little space for one float32 per weight.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        *,
        folder: Path | None = None,
        keep_bytes: int = 1 << 26,
        rows_per_sample: int = 1,
    ) -> None:
        self.layers, self._rows_per_sample = dict(layers), rows_per_sample
        shapes = {name: _shape(layer) for name, layer in self.layers.items()}
        spill = 4 * sum(shape.numel() for shape in shapes.values()) > keep_bytes
        self._sums = {
            name: _zeros(shape, self.layers[name].weight, folder, spill)
            for name, shape in shapes.items()
        }
        self._stack = ExitStack()
        self._batch: _Batch | None = None

    def batch(self, rows: int, owners: Tensor) -> None:
        """Tell of the next forward pass, for layers that see its tokens in one long row.

        Such are an output head of which only some positions are asked, and blocks that flatten
        what they get (OPT's feed-forward layers).

        Args:
            rows: Of the batch.
            owners: (N,) int64: which row each of the head's positions belongs to.
        """
        self._batch = _Batch(rows, owners)

    def __enter__(self) -> SnipScorer:
        for name, layer in self.layers.items():
            for parameter in layer.parameters(recurse=False):
                self._stack.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_(False)
            handle = layer.register_forward_hook(self._hook(name))
            self._stack.callback(handle.remove)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def scores(self) -> SnipScores:
        """Return the sums over samples of |W_ij * dL(x)/dQ_ij|, to be read layer by layer."""
        return SnipScores(self.layers, self._sums)

    def _hook(self, name: str) -> Any:
        total, together = self._sums[name], self._rows_per_sample

        def after_forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return output
            if not output.requires_grad:  # all before it is frozen: the graph starts here
                output = output.detach().requires_grad_()
            seen = inputs[0].detach()
            watched: Tensor = _Watched.apply(output, seen, total, together, self._batch)
            return watched

        return after_forward


class _Watched(torch.autograd.Function):
    """A layer's output, whose gradient is added to the sums on its way back.

    The input is saved as autograd saves tensors, so that gradient checkpointing drops it too.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, inputs: Tensor, total: Tensor, together: int, batch: _Batch | None
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.total, ctx.together, ctx.batch = total, together, batch
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,), (inputs,) = gradients, ctx.saved_tensors
        x, delta = (_by_row(one, ctx.batch) for one in (inputs, gradient))
        _accumulate(ctx.total, _by_sample(x, ctx.together), _by_sample(delta, ctx.together))
        return gradient, None, None, None, None


class SnipScores(Mapping[str, Tensor]):
    """Name -> float32 scores (out, in), made when read: one layer is in memory at a time.

    Sums over samples, so workers add theirs: read, all-reduce, and assign back, layer by layer.
    """

    def __init__(self, layers: Mapping[str, nn.Module], sums: dict[str, Tensor]) -> None:
        self._layers, self._sums = layers, sums
        self._replaced: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        total = self._sums[name]
        if name in self._replaced:
            return total.clone()
        with torch.no_grad():
            weight = _weight(self._layers[name])
            return weight.abs().to(total.dtype).mul_(total.to(weight.device))

    def __setitem__(self, name: str, scores: Tensor) -> None:
        self._sums[name].copy_(scores)
        self._replaced.add(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)


class _Batch(NamedTuple):
    rows: int
    owners: Tensor


def _by_row(tensor: Tensor, batch: _Batch | None) -> Tensor:
    """Return (rows, tokens, features) of a layer's input or gradient, whose rows may be joined."""
    if batch is None or (tensor.ndim > 2 and len(tensor) == batch.rows):
        return tensor
    flat = tensor.reshape(-1, tensor.shape[-1])
    if len(flat) != len(batch.owners):
        return flat.unflatten(0, (batch.rows, -1)) if len(flat) % batch.rows == 0 else tensor
    owners = batch.owners.to(flat.device)
    order = torch.argsort(owners, stable=True)
    counts = torch.bincount(owners, minlength=batch.rows)
    first = (counts.cumsum(0) - counts)[owners[order]]
    place = torch.arange(len(flat), device=flat.device) - first
    found = flat.new_zeros(batch.rows, int(counts.max()), flat.shape[-1])
    found[owners[order], place] = flat[order]  # what is padded adds nothing
    return found


def _by_sample(rows: Tensor, together: int) -> Tensor:
    """Return (samples, tokens, features) of a layer's input or gradient (rows, ..., features)."""
    return rows.unflatten(0, (together, -1)).transpose(0, 1).flatten(1, -2)


@torch.no_grad()
def _accumulate(total: Tensor, x: Tensor, delta: Tensor) -> None:
    """Add the sum over samples b of |delta_b^T x_b| to `total` (out, in)."""
    for rows in row_blocks(total.shape[0], total.shape[1], x.device):
        block = torch.empty(total[rows].shape, dtype=x.dtype, device=x.device)
        part = torch.zeros_like(block, dtype=total.dtype)
        for sample in range(len(x)):
            torch.mm(delta[sample, :, rows].T, x[sample], out=block)
            part.add_(block.abs_())
        total[rows] += part.to(total.device)


def _weight(layer: nn.Module) -> Tensor:
    effective = getattr(layer, "effective_weight", None)
    weight: Tensor = layer.weight if effective is None else effective()
    return weight.detach()


def _shape(layer: nn.Module) -> torch.Size:
    # Not the weight's own shape: under ZeRO-3 that is empty between forward passes.
    if not hasattr(layer, "out_features") or not hasattr(layer, "in_features"):
        raise ModelError(f"{type(layer).__name__} has no matrix weight", where="SNIP scoring")
    return torch.Size((layer.out_features, layer.in_features))


def _zeros(shape: torch.Size, like: Tensor, folder: Path | None, spill: bool) -> Tensor:
    dtype = torch.promote_types(like.dtype, torch.float32)
    if spill:
        return _mapped_zeros(shape, dtype, folder)
    return torch.zeros(shape, dtype=dtype, device=like.device)


def _mapped_zeros(shape: torch.Size, dtype: torch.dtype, folder: Path | None) -> Tensor:
    """Return zeros in a file that is already unlinked: nothing is left behind by a kill."""
    count = shape.numel()
    with tempfile.NamedTemporaryFile(dir=folder, prefix="qresafe-snip-") as file:
        try:
            # Reserve the space now: a full disk would be a bus error at the first write.
            os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
        except OSError as error:
            remedy = "free some space, or set TMPDIR to a larger disk"
            where = str(folder or tempfile.gettempdir())
            raise ResourceError("no space for SNIP scores", where=where, remedy=remedy) from error
        return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)
