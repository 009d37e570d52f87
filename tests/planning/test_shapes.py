"""Shapes of models: our arithmetic against published sizes, real modules and real files."""

from __future__ import annotations

import json

import pytest
import torch

from qresafe.errors import ModelError
from qresafe.hf.tensor_files import TensorFiles
from qresafe.loading import read_yaml
from qresafe.planning.shapes import FILE, from_config, shape_of
from qresafe.specs import ModelSpec

KNOWN = read_yaml(FILE.read_text("utf-8"))
CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "head_dim": 16,
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_model_has_the_parameters_that_its_files_hold(name: str) -> None:
    found = shape_of(ModelSpec(path=name)).parameters / 1e6
    assert found == pytest.approx(KNOWN[name]["parameters"], rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_config_gives_the_layers_of_the_real_model(kind: str, tied: bool) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = CONFIG | {"model_type": kind, "tie_word_embeddings": tied}
    real = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(real)
    linears = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    shape = from_config(config, kind)
    assert sorted(shape.linears) == sorted(linears.values())
    assert shape.parameters == sum(p.numel() for p in model.parameters())


def test_the_embedded_model_is_read_from_its_headers() -> None:
    from qresafe.embedded.build import embedded_model_path

    entries = TensorFiles(embedded_model_path()).entries
    shape = shape_of(ModelSpec())
    held = sum(torch.Size(entry.shape).numel() for entry in entries.values())
    assert shape.parameters == held
    assert len(shape.linears) == 7 * shape.blocks
    assert {entry.dtype.itemsize for entry in entries.values()} == {shape.bytes}


def test_a_folder_without_weights_is_read_from_its_config(tmp_path) -> None:
    given = CONFIG | {"model_type": "llama", "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(given))
    shape = shape_of(ModelSpec(path=str(tmp_path)))
    # q, o: 64 x 64; k, v: 32 x 64; gate, up, down: 160 x 64; two matrices of words, seven norms
    assert shape.quantized == 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 160 * 64)
    assert shape.other == 2 * 96 * 64 + 7 * 64
    assert shape.bytes == 2
    assert shape.factors(8) == 3 * 8 * (2 * 128 + 2 * 96 + 3 * 224)
    assert shape_of(ModelSpec(path=str(tmp_path), dtype="float32")).bytes == 4


OLDER = {  # the keys of their config.json
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_inner": 160, "n_positions": 32},
    "opt": {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "ffn_dim": 160,
        "word_embed_proj_dim": 64,
        "max_position_embeddings": 32,
    },
    "bloom": {"hidden_size": 64, "n_layer": 3, "n_head": 4},
    "gptj": {"n_embd": 64, "n_layer": 3, "n_head": 4, "rotary_dim": 8},
}


@pytest.mark.parametrize("kind", OLDER)
def test_older_architectures_have_other_names_for_their_sizes(kind: str, tmp_path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = OLDER[kind] | {"model_type": kind, "vocab_size": 96}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    shape = from_config(config, kind)
    assert (shape.hidden, shape.blocks, shape.heads) == (64, 3, 4)
    assert shape.feed_forward == (160 if kind in ("gpt2", "opt") else 256)
    held = sum(p.numel() for p in model.parameters())
    assert shape.parameters == pytest.approx(held, rel=0.05)
    model.save_pretrained(tmp_path)
    stored = shape_of(ModelSpec(path=str(tmp_path)))
    assert stored.parameters == held
    assert stored.quantized == shape.quantized == 3 * (4 * 64 * 64 + 2 * 64 * shape.feed_forward)


def test_the_usual_names_come_first() -> None:
    shape = from_config(CONFIG | {"n_embd": 1, "n_inner": None, "num_heads": 1}, "llama")
    assert (shape.hidden, shape.feed_forward, shape.heads) == (64, 160, 4)


def test_an_unknown_model_is_not_looked_up_on_the_net(monkeypatch) -> None:
    import socket

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a plan must not connect")

    monkeypatch.setattr(socket.socket, "connect", refused)
    with pytest.raises(ModelError, match=r"meta-llama/Llama-2-7b-chat-hf.*config\.json"):
        shape_of(ModelSpec(path="meta-lama/Llama-2-7b-chat"))


def test_a_folder_that_is_no_model_is_named(tmp_path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        shape_of(ModelSpec(path=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    with pytest.raises(ModelError, match="num_hidden_layers"):
        shape_of(ModelSpec(path=str(tmp_path)))
