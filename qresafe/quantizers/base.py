"""What a quantizer is: a function from a full-precision model to a checkpoint on disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from qresafe.errors import ModelError, SpecError, nearest
from qresafe.hf.models import read_config
from qresafe.hf.tensor_files import TensorFiles
from qresafe.hf.writing import linear_layers
from qresafe.progress import Progress

CHECKPOINT, CONTROL, LATENT = "checkpoint", "control", "latent"
HEAD = "lm_head"


@dataclass(frozen=True)
class QuantizeResult:
    """What a quantizer made.

    Attributes:
        counts: What it says of its work, for the manifest.
        control: The full-precision model after the same fine-tuning, if the method fine-tunes.
    """

    counts: Mapping[str, Any] = field(default_factory=dict)
    control: Path | None = None


class Quantizer(Protocol):
    """Writes `target/checkpoint` (loadable by plain transformers), perhaps `target/control`.

    One that trains latent weights may leave them in `target/latent`, see `writing.read_latents`.

    Called again from the start after a kill; the same arguments give the same bytes.
    """

    def __call__(
        self,
        model_path: str | Path,
        target: Path,
        spec: Any,
        *,
        control: bool = True,
        progress: Progress | None = None,
    ) -> QuantizeResult: ...


def put(made: Path, target: Path) -> Path:
    """Move a finished folder to its place; what an earlier, killed call left there goes."""
    shutil.rmtree(target, ignore_errors=True)
    made.rename(target)
    return target


def layers_to_quantize(folder: Path, skip: tuple[str, ...], group_size: int) -> list[str]:
    """Return the linear layers to quantize, having checked that the format can hold them.

    compressed-tensors stores whole groups only, so a group size must divide every row.

    Args:
        folder: The full-precision model.
        skip: Names to leave alone: a whole module name, or its last part ("lm_head").
        group_size: Weights per scale; -1 for one group per row.

    Raises:
        SpecError: `skip` names what the model does not have.
        ModelError: No layer is left, a row is not a multiple of the group size, or the model is
            quantized already, a mixture of experts, or not of text alone.
    """
    refuse_quantized(folder)
    if "vision_config" in read_config(folder):  # its layers have other names, untried here
        remedy = "give a text-only model, such as gemma-3-1b-it"
        raise ModelError("not a text-only model", where=str(folder), remedy=remedy)
    files = TensorFiles(folder)
    if any(".experts." in name for name in files):
        # transformers 5.17 looks for packed experts there and, finding none, draws them at random
        what = "compressed-tensors cannot keep a mixture's experts in full precision"
        raise ModelError(what, where=str(folder), remedy="use quantize.method: bnb")
    linear = linear_layers(folder)
    check_skip(skip, linear, skipped)
    names = [n for n in linear if not skipped(n, skip)]
    missing = [name for name in names if f"{name}.weight" not in files]
    if missing:
        remedy = "add it to quantize.skip"
        raise ModelError(f"no weight for layer {missing[0]}", where=str(folder), remedy=remedy)
    if not names:
        raise no_layers(folder)
    columns = {name: files.shape(f"{name}.weight")[1] for name in names}
    _check_groups(columns, group_size, str(folder))
    return names


def refuse_quantized(folder: Path) -> None:
    """Refuse a model whose weights are codes: they would be rounded as if they were numbers.

    Raises:
        ModelError: It is quantized.
    """
    if "quantization_config" in read_config(folder):
        remedy = (
            "give the full-precision model as model.path; this folder as quantize.path of "
            "method checkpoint"
        )
        raise ModelError("W is quantized already", where=str(folder), remedy=remedy)


def skipped(name: str, skip: tuple[str, ...]) -> bool:
    """Return whether `skip` names a layer: in full, or by its last part ("lm_head")."""
    return any(name == entry or name.endswith(f".{entry}") for entry in skip)


def check_skip(
    skip: Sequence[str], linear: Sequence[str], skips: Callable[[str, tuple[str, ...]], bool]
) -> None:
    """Refuse an entry of `skip` that skips nothing: a misspelt layer would be quantized.

    Args:
        skip: What the user wrote; the default "lm_head" may be missing, as in tied models.
        linear: The model's layers.
        skips: Whether entries skip a layer, as the method takes them.

    Raises:
        SpecError: An entry skips none of them.
    """
    for entry in skip:
        if entry != HEAD and not any(skips(name, (entry,)) for name in linear):
            known = {part for name in linear for part in (name, name.rpartition(".")[2])}
            what = f"no layer {entry!r} to leave alone"
            raise SpecError(what, where="quantize.skip", remedy=nearest(entry, known))


def no_layers(folder: Path) -> ModelError:
    """Return the error for a model of which a method can quantize nothing."""
    remedy = "shorten quantize.skip, or use a model made of nn.Linear layers"
    return ModelError("no linear layer to quantize", where=str(folder), remedy=remedy)


def _check_groups(columns: Mapping[str, int], group_size: int, where: str) -> None:
    if group_size < 0:
        return
    for name, width in columns.items():
        if width % group_size:
            fits = [g for g in range(group_size, 7, -1) if not any(w % g for w in columns.values())]
            remedy = f"set quantize.group_size to {' or '.join(map(str, [*fits[:2], -1]))}"
            what = f"the {width} inputs of {name} are no multiple of group_size {group_size}"
            raise ModelError(what, where=where, remedy=remedy)
