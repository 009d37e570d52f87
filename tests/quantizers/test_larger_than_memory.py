"""Models for which there is no memory: the same files, to the byte, and less memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import save_tiny_tokenizer
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

from bench import layerwise
from qresafe.errors import ModelError
from qresafe.hf import bnb_writing, offloaded
from qresafe.hf.block_calls import Passage, batches_of, calls_of, decoder_blocks
from qresafe.hf.models import load_model
from qresafe.quantize_specs import BnbSpec, QuantizeSpec
from qresafe.quantizers import bnb
from qresafe.registry import quantizers

FEW = {"sequences": 3, "max_length": 48, "calibration": {"risk": "I"}}
METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq", "group_size": 32} | FEW,
    "awq": {"method": "awq", "group_size": 32, "grid_points": 3} | FEW,
    "fp8 dynamic": {"method": "fp8"},
    "fp8 static": {"method": "fp8", "activations": "static"} | FEW,
    "aqlm": {"method": "aqlm", "codebook_bits": 4, "rounds": 1, "finetune_steps": 2} | FEW,
}
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma 2: its head is its embedding, and its norms multiply by 1 + weight."""
    folder = tmp_path_factory.mktemp("gemma")
    config = transformers.Gemma2Config(vocab_size=save_tiny_tokenizer(folder), **SIZES)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("method", "architecture"), [*((method, "tiny_llama") for method in METHODS), ("awq", "gemma")]
)
def test_weights_on_disk_give_the_same_bytes(
    method: str,
    architecture: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = request.getfixturevalue(architecture)
    spec = TypeAdapter(QuantizeSpec).validate_python(METHODS[method])
    quantizers.get(spec.method)(source, tmp_path / "memory", spec)
    monkeypatch.setattr(offloaded, "free_memory", lambda: 0)
    quantizers.get(spec.method)(source, tmp_path / "disk", spec)
    found, expected = (bytes_of(tmp_path / n / "checkpoint") for n in ("disk", "memory"))
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    assert [file.name for file in (tmp_path / "disk").iterdir()] == ["checkpoint"]


def test_weights_lie_on_disk_where_memory_is_short(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = offloaded.weight_bytes(tiny_llama)
    stored = load_file(tiny_llama / "model.safetensors").values()
    assert size == sum(value.nbytes for value in stored)
    assert offloaded.weight_bytes(tiny_llama, torch.bfloat16) == size // 2  # it is float32
    for free, on_disk in ((2 * size, False), (2 * size - 1, True)):
        monkeypatch.setattr(offloaded, "free_memory", lambda free=free: free)
        with offloaded.within_memory(tiny_llama, tmp_path) as model:
            layer = model.model.layers[0].mlp.up_proj
            assert (type(layer._parameters).__name__ == "DiskCache") == on_disk
            with torch.no_grad():
                logits = model(torch.arange(9)[None]).logits
            assert torch.equal(logits, load_model(tiny_llama)(torch.arange(9)[None]).logits)
    assert not list(tmp_path.iterdir())


def test_a_gpu_has_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that the host holds need not fit the device that it is to run on."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 10))
    assert offloaded._room_on("cuda:0") == 7
    assert offloaded._room_on("cpu") == math.inf


BNB = [
    BnbSpec(),
    BnbSpec(double_quant=True),
    BnbSpec(format="fp4"),
    BnbSpec(format="int8"),
    BnbSpec(skip=("lm_head", "down_proj")),
]


@pytest.mark.parametrize("spec", BNB, ids=["nf4", "nf4 double", "fp4", "int8", "skip"])
@pytest.mark.parametrize("architecture", ["tiny_llama", "gemma"])
def test_bitsandbytes_tensor_by_tensor_is_what_transformers_saves(
    spec: BnbSpec, architecture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = request.getfixturevalue(architecture)
    bnb.quantize(source, tmp_path, spec)
    bnb_writing.save_whole(tmp_path / "whole", source, bnb.options(spec))
    assert bytes_of(tmp_path / "checkpoint") == bytes_of(tmp_path / "whole")


def test_what_the_model_would_not_save_is_left_to_transformers(gemma: Path, tmp_path: Path) -> None:
    source = tmp_path / "w"
    source.mkdir()
    for file in gemma.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    weights = load_file(gemma / "model.safetensors")
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}  # stored twice
    save_file(weights | head, source / "model.safetensors", metadata={"format": "pt"})
    bnb.quantize(source, tmp_path / "twice", BnbSpec(format="int8"))
    bnb.quantize(gemma, tmp_path / "once", BnbSpec(format="int8"))
    assert bytes_of(tmp_path / "twice" / "checkpoint") == bytes_of(tmp_path / "once" / "checkpoint")


def test_blocks_are_called_as_by_the_model(tiny_llama: Path, gemma: Path) -> None:
    for source in (tiny_llama, gemma):
        model = load_model(source)
        batches = batches_of([[5, 6, 7, 8], [9, 10], [11, 12, 13]], 2, 0, "cpu")
        blocks = list(decoder_blocks(model).values())
        passage = Passage(model, blocks, batches)
        for number, block in enumerate(blocks):
            found = passage.calls(number)
            expected = calls_of(model, block, batches)
            for mine, theirs in zip(found, expected, strict=True):
                assert torch.equal(mine.args[0], theirs.args[0])
                assert mine.kwargs.keys() == theirs.kwargs.keys()
                with torch.no_grad():
                    assert torch.equal(mine.on(block), theirs.on(block))
            passage.pass_through(number, block)


def test_a_model_that_does_more_between_blocks_is_refused(tiny_llama: Path) -> None:
    model = load_model(tiny_llama)
    blocks = list(decoder_blocks(model).values())
    blocks[1].register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
    batches = batches_of([[5, 6, 7]], 1, 0, "cpu")
    with pytest.raises(ModelError, match="changes hidden states between its blocks"):
        Passage(model, blocks, batches)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return layerwise.make_model(tmp_path_factory.mktemp("large"))


@pytest.mark.long
@pytest.mark.parametrize("name", layerwise.SETTINGS)
def test_the_peak_is_far_below_the_weights(name: str, large: Path) -> None:
    weights = (large / "model.safetensors").stat().st_size
    assert weights > 400e6
    assert layerwise.measure(name, large)["bytes"] < weights / 2
