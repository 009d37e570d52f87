"""16 bits for the most safety-critical weights, most other methods for the rest; no training.

The paper's variant without fine-tuning: weights are scored by SNIP on W, with the loss
-log p(y|x) of W's own refusals of harmful prompts, and the top fraction is kept. Kept are single
weights, or by their mean score rows or blocks of a layer, in a file that qresafe alone puts back
into the deployed model; or whole linear layers, by mean score too, which any server runs.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qresafe.core.masks import iter_top_fraction
from qresafe.core.snip import SnipScorer
from qresafe.core.tiles import SINGLE, Tiles, cut, fits
from qresafe.embedded.calibration import harmful_texts
from qresafe.errors import DataError, ModelError, SpecError
from qresafe.hf.chat import prompt_ids
from qresafe.hf.checkpoint import QuantizedCheckpoint
from qresafe.hf.finetune import Chat, answer_logits
from qresafe.hf.generate import generate_batch
from qresafe.hf.models import load_model, load_tokenizer
from qresafe.hf.overlaid import decompress_on_load, write_kept
from qresafe.hf.tensor_files import TensorFiles
from qresafe.hf.writing import in_16_bits, linear_layers, write_halved
from qresafe.progress import Progress, Silent
from qresafe.quantize_specs import BaseSpec, Critical16Spec, QloraSpec
from qresafe.quantizers.base import CHECKPOINT, CONTROL, QuantizeResult, put
from qresafe.registry import judges, planned_layers, quantizers
from qresafe.specs import GenerateSpec
from qresafe.storage import local_folder

ALONE = "plain transformers and other servers load this folder without its 16-bit weights"


def quantize(
    model_path: str | Path,
    target: Path,
    spec: Critical16Spec,
    *,
    control: bool = True,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Write `target/checkpoint`: the base method's, with critical weights in 16 bits.

    Needs W in memory with the activations of a batch, and what the base method needs. A base
    that fine-tunes keeps the values of W, not of its own training.

    Raises:
        ModelError: A layer does not fit the base method.
        DataError: W refuses none of the prompts.
        SpecError: No row, block or layer is as small as `fraction`.
    """
    source = local_folder(model_path)
    texts = harmful_texts(spec)
    names = planned(source, spec)
    shown = progress or Silent()
    shown.start("score", len(texts), "prompts")
    refused, scores = _scored(source, names, texts, spec, shown)
    shown.finish(f"{refused} refusals")
    counts = {"refusals": refused, "prompts": len(texts), "structure": spec.structure}
    make = _keep_layers if spec.structure == "layers" else _keep_tiles
    made = make(source, target, spec, scores, control, shown)
    return QuantizeResult(dict(made.counts) | counts, made.control)


def planned(source: Path, spec: Critical16Spec) -> list[str]:
    """Return the layers of which weights may be kept; see `registry.planned_layers`."""
    base = spec.base
    names: list[str] = planned_layers.get(base.method)(source, base)
    if isinstance(base, QloraSpec):  # all that its own base quantizes, adapted or not
        names = planned_layers.get(base.base.method)(source, base.base)
    if odd := sorted(set(names) - set(linear_layers(source))):
        what = f"critical16 scores nn.Linear layers, and {odd[0]} is another kind"
        remedy = f"use quantize.method: {spec.base.method}, or another model"
        raise ModelError(what, where=str(source), remedy=remedy)
    if spec.structure != "weights" and spec.fraction > 0:
        files = TensorFiles(source)
        _check_shapes({n: files.shape(f"{n}.weight") for n in names}, spec, str(source))
    return names


def _check_shapes(shapes: Mapping[str, Sequence[int]], spec: Critical16Spec, where: str) -> None:
    """Refuse layers that blocks do not fill, and a fraction into which nothing fits."""
    tiles = {name: tile_of(spec, rows, columns) for name, (rows, columns) in shapes.items()}
    for name, (rows, columns) in shapes.items():
        if not fits((rows, columns), tiles[name]):
            block = " x ".join(map(str, tiles[name]))
            what = f"{name} is {rows} x {columns}, which blocks of {block} do not fill"
            remedy = "set quantize.block to divisors of both, or use structure: rows"
            raise ModelError(what, where=where, remedy=remedy)
    total = sum(math.prod(shape) for shape in shapes.values())
    least = min(math.prod(tile) for tile in tiles.values())
    check_room(least, total, spec.fraction, spec.structure.removesuffix("s"))


def tile_of(spec: Critical16Spec, rows: int, columns: int) -> tuple[int, int]:
    """Return what is kept together of a layer (rows, columns) of outputs and inputs."""
    shapes = {"weights": SINGLE, "rows": (1, columns), "layers": (rows, columns)}
    return spec.block or shapes[spec.structure]


def check_room(least: int, total: int, fraction: float, kind: str) -> None:
    """Refuse a fraction into which not even the smallest row, block or layer fits.

    Args:
        least: Weights of the smallest one.
        total: All weights.
        fraction: Of them.
        kind: What it is.

    Raises:
        SpecError: It does not fit.
    """
    if least > fraction * total:
        remedy = f"use at least {least / total:.4f}, or structure: weights"
        raise SpecError(f"no {kind} is as small as {fraction:g} of all", remedy=remedy)


def skipping(spec: BaseSpec, more: Sequence[str]) -> BaseSpec:
    """Return a method's spec that leaves more layers alone."""
    if isinstance(spec, QloraSpec):
        return spec.model_copy(update={"base": skipping(spec.base, more)})
    return spec.model_copy(update={"skip": (*spec.skip, *more)})


def _scored(
    source: Path, names: Sequence[str], texts: Sequence[str], spec: Critical16Spec, shown: Progress
) -> tuple[int, Mapping[str, Tensor]]:
    """Return how many prompts W refuses, and the summed SNIP scores of W over its refusals."""
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    model = load_model(source, device=device).requires_grad_(False)
    chats = _refusals(model, load_tokenizer(source), texts, spec, shown)
    layers = {name: model.get_submodule(name) for name in names}
    with SnipScorer(layers) as scorer:
        for start in range(0, len(chats), spec.batch_size):
            logits, targets = answer_logits(model, chats[start : start + spec.batch_size])
            torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum").backward()
    return len(chats), scorer.scores()


def _refusals(
    model: Any, tokenizer: Any, texts: Sequence[str], spec: Critical16Spec, shown: Progress
) -> list[Chat]:
    judge = judges.get(spec.judge)
    greedy = GenerateSpec(max_new_tokens=spec.max_new_tokens)
    chats: list[Chat] = []
    for start in range(0, len(texts), spec.batch_size):
        asked = texts[start : start + spec.batch_size]
        prompts = [prompt_ids(tokenizer, text) for text in asked]
        answers = generate_batch(model, tokenizer, prompts, list(asked), greedy)
        for text, prompt, answer in zip(asked, prompts, answers, strict=True):
            if judge("harmful", text, answer.text).outcome == "refused":
                chats.append((prompt, answer.ids))
        shown.advance(len(asked))
    if not chats:
        remedy = "give prompts that the model refuses, or another judge"
        raise DataError("W refuses none of the prompts", where="quantize", remedy=remedy)
    return chats


def _keep_tiles(
    source: Path,
    target: Path,
    spec: Critical16Spec,
    scores: Mapping[str, Tensor],
    control: bool,
    shown: Progress,
) -> QuantizeResult:
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        method = quantizers.get(spec.base.method)
        made = method(source, Path(scratch), spec.base, control=control, progress=shown)
        base = QuantizedCheckpoint.open(Path(scratch) / CHECKPOINT)
        kept = _overlay(base, TensorFiles(source), scores, spec)
        # Codes beneath kept weights act on nothing; stored are those that `encode` finds again.
        base.rewrite(target / CHECKPOINT, _codes_beneath(base, kept))
        if kept:
            write_kept(target / CHECKPOINT, kept)
            decompress_on_load(target / CHECKPOINT)
        arm = put(made.control, target / CONTROL) if made.control else None
    number = sum(tiles.values.numel() for tiles in kept.values())
    total = sum(scores[name].numel() for name in base.names)
    counts = dict(made.counts) | {"kept_weights": number, "kept_fraction": number / total}
    if spec.structure != "weights":
        counts[f"kept_{spec.structure}"] = sum(len(tiles.ids) for tiles in kept.values())
    counts |= {"served_by": ALONE if kept else "transformers"}
    return QuantizeResult(counts, arm)


def _overlay(
    base: QuantizedCheckpoint,
    weights: TensorFiles,
    scores: Mapping[str, Tensor],
    spec: Critical16Spec,
) -> dict[str, Tiles]:
    among = {name: scores[name].cpu() for name in base.names}
    chosen = (
        iter_top_fraction(among, spec.fraction)
        if spec.structure == "weights"
        else iter(best_tiles(among, spec))
    )
    kept: dict[str, Tiles] = {}
    for name, mask in chosen:
        if mask.any():
            ids, weight = mask.flatten().nonzero()[:, 0], weights[f"{name}.weight"]
            shape = (weight.shape[0], weight.shape[1])
            values = in_16_bits(cut(weight, tile_of(spec, *shape))[ids])
            kept[name] = Tiles(shape, ids, values)
    return kept


def best_tiles(scores: Mapping[str, Tensor], spec: Critical16Spec) -> list[tuple[str, Tensor]]:
    """Return layers and masks of the rows or blocks to keep: those of the largest mean score.

    In that order, until the next one would exceed the fraction; of equals the first.

    Args:
        scores: Layer -> (out, in).
        spec: Which structure, and how much.
    """
    tiles = {name: cut(score, tile_of(spec, *score.shape)) for name, score in scores.items()}
    means = torch.cat([tile.double().mean((1, 2)) for tile in tiles.values()])
    sizes = torch.cat([torch.full((len(tile),), tile[0].numel()) for tile in tiles.values()])
    order = means.argsort(descending=True, stable=True)
    inside = sizes[order].cumsum(0) <= round(spec.fraction * int(sizes.sum()))
    kept = torch.zeros(len(means), dtype=torch.bool)
    kept[order[inside]] = True
    parts = kept.split([len(tile) for tile in tiles.values()])
    return list(zip(tiles, parts, strict=True))


def _codes_beneath(base: QuantizedCheckpoint, kept: Mapping[str, Tiles]) -> dict[str, Tensor]:
    changed = {}
    for name, tiles in kept.items():
        tensor = base.read(name)
        if tensor.grid.code_shape != tensor.grid.shape:
            continue  # a code stands for weights that were not kept too
        positions, values = tiles.weights()
        weight = tensor.dense()
        weight.view(-1)[positions] = values.to(weight.dtype)
        codes = tensor.codes.clone()
        codes.view(-1)[positions] = tensor.grid.encode(weight).reshape(-1)[positions]
        changed[name] = codes
    return changed


def _keep_layers(
    source: Path,
    target: Path,
    spec: Critical16Spec,
    scores: Mapping[str, Tensor],
    control: bool,
    shown: Progress,
) -> QuantizeResult:
    kept = densest(scores, spec.fraction)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        base = skipping(spec.base, kept)
        method = quantizers.get(base.method)
        made = method(source, Path(scratch), base, control=control, progress=shown)
        write_halved(target / CHECKPOINT, Path(scratch) / CHECKPOINT, kept)
        arm = put(made.control, target / CONTROL) if made.control else None
    counts = dict(made.counts) | {"kept_layers": kept}
    return QuantizeResult(counts, arm)


def densest(scores: Mapping[str, Tensor], fraction: float) -> list[str]:
    """Return layers in the order of score per weight, each that still fits into the fraction.

    Raises:
        SpecError: Not even the smallest layer does.
        ModelError: All would be kept.
    """
    sizes = {name: scores[name].numel() for name in scores}
    mass = {name: float(scores[name].double().mean()) for name in scores}
    if fraction > 0:
        check_room(min(sizes.values()), sum(sizes.values()), fraction, "layer")
    room = fraction * sum(sizes.values())
    chosen: list[str] = []
    for name in sorted(sizes, key=lambda name: (-mass[name], name)):
        if sizes[name] <= room:
            room -= sizes[name]
            chosen.append(name)
    if len(chosen) == len(sizes):
        raise ModelError("every layer would be kept", remedy="lower quantize.fraction")
    return chosen
