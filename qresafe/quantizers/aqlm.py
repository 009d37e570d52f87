"""AQLM: additive codebooks fitted to what each layer computes (Egiazarian et al. 2024).

Block by block, on the inputs that the quantized blocks before it make. Then, if asked for, the
block's codebooks, scales and norms are tuned until its outputs are those of the full-precision
block on the same inputs (the paper's fine-tuning). That looks at hidden states, never at answers,
so there is nothing that a control arm in full precision could learn: its targets are its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qresafe.core.additive import wrapped
from qresafe.core.additive_fit import AdditiveFit, FitSettings, fit_additive
from qresafe.core.blocks import keyed_generator
from qresafe.embedded.calibration import calibration_chats
from qresafe.errors import ModelError
from qresafe.hf.block_calls import Call, Passage, batches_of, decoder_blocks, second_moments
from qresafe.hf.chat import chat_ids
from qresafe.hf.models import load_tokenizer
from qresafe.hf.offloaded import in_memory, within_memory
from qresafe.hf.tensor_files import TensorFiles
from qresafe.hf.writing import AqlmLayer, meta_model, write_aqlm
from qresafe.progress import Progress, Silent
from qresafe.quantize_specs import AqlmSpec
from qresafe.quantizers.base import CHECKPOINT, QuantizeResult, layers_to_quantize
from qresafe.storage import local_folder

ADAM_BETAS = (0.9, 0.95)  # of the paper's program


def quantize(
    model_path: str | Path,
    target: Path,
    spec: AqlmSpec,
    *,
    control: bool = True,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Write `target/checkpoint`, which transformers loads through `aqlm`; see `Quantizer`.

    Memory: the model in float32, or one block of it where that is too much, and the calibration
    inputs of a block, second moments (in, in) and, while it is tuned, gradients.

    Raises:
        ModelError: A layer's inputs are no multiple of the group, it has fewer groups than a
            codebook has vectors, it lies outside the blocks, or it is not finite.
        DataError: A user's calibration file is malformed.
    """
    source = local_folder(model_path)
    names = planned(source, spec)
    shown = progress or Silent()
    shown.start("quantize", len(names), "layers")
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    sequences = _sequences(source, spec)
    target.mkdir(parents=True, exist_ok=True)
    with within_memory(source, target, dtype=torch.float32, device=device) as model:
        work = _Work(model, names, spec, stored_dtype(source, names), shown)
        work.run(batches_of(sequences, spec.batch_size, 0, device))
    write_aqlm(target / CHECKPOINT, source, work.layers, work.norms, _scheme(spec))
    weights = sum(layer.codes.shape[0] * layer.width for layer in work.layers.values())
    size = sum(layer.nbytes for layer in work.layers.values())
    counts = {"layers": len(names), "chats": len(sequences), "bits_per_weight": 8 * size / weights}
    return QuantizeResult(counts | {"relative_losses": work.losses})


def planned(source: Path, spec: AqlmSpec) -> list[str]:
    """Return what `quantize` would; see `registry.planned_layers`."""
    names, files = layers_to_quantize(source, spec.skip, -1), TensorFiles(source)
    blocks = tuple(f"{block}." for block in decoder_blocks(meta_model(source)))
    if outside := [name for name in names if not name.startswith(blocks)]:
        remedy = "add it to quantize.skip"
        raise ModelError(f"{outside[0]} lies outside the decoder's blocks", remedy=remedy)
    check_layers({n: files.shape(f"{n}.weight") for n in names}, spec, str(source))
    return names


def check_layers(shapes: Mapping[str, tuple[int, ...]], spec: AqlmSpec, where: str) -> None:
    """Refuse layers that the settings do not suit.

    Raises:
        ModelError: A row is no multiple of the group, or there are fewer groups than vectors.
    """
    vectors = 1 << spec.codebook_bits
    for name, (rows, columns) in shapes.items():
        if columns % spec.group_size:
            what = f"the {columns} inputs of {name} are no multiple of {spec.group_size}"
            remedy = "set quantize.group_size to a divisor, or add the layer to quantize.skip"
            raise ModelError(what, where=where, remedy=remedy)
        groups = rows * columns // spec.group_size
        if groups < vectors:
            what = f"{name} has {groups} groups, fewer than the {vectors} vectors of a codebook"
            bits = groups.bit_length() - 1
            remedy = f"set quantize.codebook_bits to {bits} or less, or add it to quantize.skip"
            raise ModelError(what, where=where, remedy=remedy)


def stored_dtype(source: Path, names: list[str]) -> torch.dtype:
    """Return the 16-bit type of codebooks and scales: the model's own, else float16."""
    dtype = TensorFiles(source).entries[f"{names[0]}.weight"].dtype
    return dtype if dtype == torch.bfloat16 else torch.float16


class _Work:
    """The state of one quantization: the model, its blocks done so far, and what was found."""

    def __init__(
        self, model: Any, names: list[str], spec: AqlmSpec, stored: torch.dtype, shown: Progress
    ) -> None:
        self.model, self.spec, self.stored, self.shown = model, spec, stored, shown
        self.blocks = decoder_blocks(model)
        self.names = {b: [n for n in names if n.startswith(f"{b}.")] for b in self.blocks}
        self.layers: dict[str, AqlmLayer] = {}
        self.norms: dict[str, Tensor] = {}
        self.losses: dict[str, float] = {}

    def run(self, batches: list[Any]) -> None:
        passage = Passage(self.model, list(self.blocks.values()), batches)
        for number, (name, block) in enumerate(self.blocks.items()):
            with in_memory(block):
                self._quantize(name, block, passage.calls(number))
                passage.pass_through(number, block)

    def _quantize(self, name: str, block: nn.Module, calls: list[Call]) -> None:
        modules = {layer: self.model.get_submodule(layer) for layer in self.names[name]}
        moments, outputs = second_moments(block, modules, calls)
        fits = {layer: self._fit(layer, modules[layer], moments[layer]) for layer in modules}
        norms = norms_of(block)
        if self.spec.finetune_steps and fits:
            inner = {layer.removeprefix(f"{name}."): fit for layer, fit in fits.items()}
            tune(block, inner, norms, calls, outputs, self.spec)
            self.norms |= {f"{name}.{norm}": value.data for norm, value in norms.items()}
        self._settle(modules, fits)

    def _fit(self, name: str, module: Any, moment: Tensor) -> AdditiveFit:
        if not torch.isfinite(module.weight).all() or not torch.isfinite(moment).all():
            remedy = "use an intact copy of the model"
            raise ModelError(f"{name} has weights or inputs that are not finite", remedy=remedy)
        spec = self.spec
        settings = FitSettings(
            spec.codebooks,
            spec.codebook_bits,
            spec.group_size,
            beam=spec.beam,
            rounds=spec.rounds,
            tolerance=spec.tolerance,
        )
        generator = keyed_generator(spec.seed, name)
        fit, losses = fit_additive(module.weight, moment, settings, generator)
        self.losses[name] = losses[-1]
        self.shown.advance(note=f"{losses[-1]:.3f} of the loss")
        return fit

    def _settle(self, modules: Mapping[str, Any], fits: Mapping[str, AdditiveFit]) -> None:
        """Round codebooks and scales to what is stored, and put the weights in their place."""
        for name, fit in fits.items():
            fit.codebooks = fit.codebooks.detach().to(self.stored)
            fit.scales = fit.scales.detach().to(self.stored)
            codes = wrapped(fit.indices, self.spec.codebook_bits)
            self.layers[name] = AqlmLayer(codes.cpu(), fit.codebooks.cpu(), fit.scales.cpu())
            settled = AdditiveFit(fit.codebooks.float(), fit.scales.float(), fit.indices)
            modules[name].weight.data = settled.dense()


def norms_of(block: nn.Module) -> dict[str, nn.Parameter]:
    """Return the vectors of a block that belong to no linear layer: its norms' weights."""
    linear = {n for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    return {
        name: value
        for name, value in block.named_parameters()
        if value.dim() == 1 and name.rpartition(".")[0] not in linear
    }


@torch.enable_grad()  # type: ignore[untyped-decorator]
def tune(
    block: nn.Module,
    fits: Mapping[str, AdditiveFit],
    norms: Mapping[str, nn.Parameter],
    calls: list[Call],
    outputs: list[Tensor],
    spec: AqlmSpec,
) -> None:
    """Train codebooks, scales and norms towards the block's full-precision outputs, in place."""
    trained = [*norms.values()]
    for fit in fits.values():
        trained += [fit.codebooks, fit.scales]
    for value in trained:
        value.requires_grad_()
    optimizer = torch.optim.Adam(trained, lr=spec.finetune_lr, betas=ADAM_BETAS)
    for step in range(spec.finetune_steps):
        call, wanted = calls[step % len(calls)], outputs[step % len(calls)]
        weights = {f"{name}.weight": fit.dense() for name, fit in fits.items()}
        made = functional_call(block, weights, call.args, call.kwargs)
        hidden = made[0] if isinstance(made, tuple) else made
        error = (hidden - wanted)[call.mask].square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    for value in trained:
        value.requires_grad_(False)


def _sequences(source: Path, spec: AqlmSpec) -> list[list[int]]:
    tokenizer = load_tokenizer(source)
    chats = calibration_chats(spec.calibration, spec.seed)[: spec.sequences]
    pairs = [chat_ids(tokenizer, chat) for chat in chats]
    return [(prompt + answer)[: spec.max_length] for prompt, answer in pairs]


def _scheme(spec: AqlmSpec) -> dict[str, int]:
    return {
        "in_group_size": spec.group_size,
        "out_group_size": 1,
        "num_codebooks": spec.codebooks,
        "nbits_per_codebook": spec.codebook_bits,
    }
