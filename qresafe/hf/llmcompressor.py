"""llm-compressor's one-shot quantizers: quiet, repeatable, and given our own token ids."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.utils import patch_attr

from qresafe.errors import ModelError, ResourceError
from qresafe.hf.checkpoint import built_aside
from qresafe.hf.offloaded import within_memory
from qresafe.hf.writing import copy_sidecars, linear_layers, refuse_infinite
from qresafe.progress import Progress

Settings = Mapping[str, Any]
SHARD = "1GB"  # of the quantized model: a file of it is held, and once more while it is written
NOTHING_SCALED = "No error metrics were collected"  # llm-compressor's words, as a mere warning


def compress(
    target: Path,
    source: Path,
    layers: Sequence[str],
    recipe: Mapping[str, Settings],
    *,
    weights: Settings,
    inputs: Settings | None = None,
    sequences: Sequence[Sequence[int]] = (),
    progress: Progress,
) -> list[str]:
    """Write a compressed-tensors checkpoint of a full-precision model.

    The model is on the CPU, or on disk where it is too large (`qresafe.hf.offloaded`); one block
    at a time goes to the GPU if there is one, else to memory, with the activations of all
    sequences between two blocks. Of the quantized model, one file of it is in memory at a time.

    Args:
        target: Local folder to make.
        source: The full-precision model.
        layers: Modules to quantize; all others stay as they are.
        recipe: Name of a modifier of llm-compressor -> its own settings, in order. The last one
            quantizes, and gets the scheme.
        weights: Of compressed-tensors' `QuantizationArgs`.
        inputs: The same for activations; None leaves them alone.
        sequences: Token ids to calibrate on, in this order, each a batch of its own.
        progress: Is told of the layers that are done.

    Returns:
        What llm-compressor warned of.

    Raises:
        ResourceError: llm-compressor is not installed.
        ModelError: It cannot quantize this model, or a weight is NaN or infinite.
    """
    library = _library()
    group = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs.model_validate(weights),
        input_activations=None if inputs is None else QuantizationArgs.model_validate(inputs),
    )
    ignore = [name for name in linear_layers(source) if name not in set(layers)]
    scheme = {"config_groups": {"group_0": group}, "ignore": ignore}
    modifiers = _modifiers(recipe, scheme)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _quiet() as told, within_memory(source, target.parent) as model:
        for name in layers:
            refuse_infinite(name, model.get_submodule(name).weight)
        calibrated = _batches(sequences) if sequences else None
        _oneshot(library, model, [*modifiers, _told(progress)], calibrated, source)
        if any(NOTHING_SCALED in line for line in told):
            what = "AWQ finds no layer that could take another's scales, and would only round"
            raise ModelError(what, where=str(source), remedy="use quantize.method: gptq or rtn")
        with built_aside(target) as folder:
            model.save_pretrained(folder, max_shard_size=SHARD)
            (folder / "recipe.yaml").unlink()  # the manifest has all of it
            copy_sidecars(source, folder)
    return told


def _oneshot(library: Any, model: Any, recipe: list[Any], batches: Any, source: Path) -> None:
    processor = object()  # nothing is left to tokenize
    try:
        library.oneshot(model=model, processor=processor, recipe=recipe, dataset=batches)
    except (ValueError, RuntimeError) as error:
        text = " ".join(str(error).split())[:300]
        what = f"llm-compressor cannot quantize the model ({text})"
        remedy = "use quantize.method: rtn, or bnb"
        raise ModelError(what, where=str(source), remedy=remedy) from error


def _library() -> Any:
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")  # it logs at import already
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it does so, and warns
    try:
        import llmcompressor
    except ImportError:
        remedy = "pip install llmcompressor"
        raise ResourceError("llm-compressor is not installed", remedy=remedy) from None
    return llmcompressor


def _modifiers(recipe: Mapping[str, Settings], scheme: Settings) -> list[Any]:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    kinds = {kind.__name__: kind for kind in (AWQModifier, GPTQModifier, QuantizationModifier)}
    *before, last = recipe
    return [
        *(kinds[name](**recipe[name]) for name in before),
        kinds[last](**recipe[last], **scheme),
    ]


def _told(progress: Progress) -> Any:
    """Return a modifier that changes nothing and reports each quantized layer."""
    from llmcompressor.modifiers import Modifier

    class Told(Modifier):
        def on_initialize(self, state: Any, **_: Any) -> bool:
            return True

        def on_sequential_epoch_end(
            self, state: Any, event: Any, modules: list[Any], **_: Any
        ) -> None:
            progress.advance(sum(hasattr(module, "quantization_scheme") for module in modules))

    return Told()


def _batches(sequences: Sequence[Sequence[int]]) -> Any:
    rows = [torch.tensor([ids]) for ids in sequences]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in rows]
    return torch.utils.data.DataLoader(batches, batch_size=None)


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Run llm-compressor in a session of its own, without bars; collect its modifiers' warnings."""
    from llmcompressor.core.session_functions import create_session
    from llmcompressor.pipelines.cache import IntermediatesCache
    from loguru import logger
    from tqdm import tqdm

    told: list[str] = []
    sink = logger.add(
        lambda line: told.append(str(line).strip()),
        level="WARNING",
        format="{message}",
        filter="llmcompressor.modifiers",
    )
    shown = tqdm.__init__

    def hidden(bar: Any, *args: Any, **settings: Any) -> None:
        shown(bar, *args, **(settings | {"disable": True}))

    with ExitStack() as stack:
        stack.callback(logger.remove, sink)
        stack.enter_context(create_session())
        stack.enter_context(patch_attr(tqdm, "__init__", hidden))
        # tracing a model for the sequential pipeline sets off a note to torch's developers
        stack.enter_context(patch_attr(getLogger("torch.fx._symbolic_trace"), "disabled", True))
        stack.enter_context(warnings.catch_warnings(action="ignore", category=UserWarning))
        if not torch.accelerator.is_available():  # AWQ pins memory without asking for one
            nothing = patch_attr(IntermediatesCache, "pin_memory", lambda *_: None)
            stack.enter_context(nothing)
        yield told
