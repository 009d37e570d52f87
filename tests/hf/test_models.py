"""Finding, checking and loading models; every bad folder ends in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from upath import UPath

from qresafe.errors import CorruptArtifactError, ModelError
from qresafe.hf import models
from qresafe.specs import ModelSpec


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def test_a_folder_resolves_and_loads_in_evaluation_mode(tiny_llama: Path) -> None:
    reference = models.resolve(ModelSpec(path=str(tiny_llama)))
    model = models.load_model(reference.path)
    assert not model.training
    assert model.config.num_hidden_layers == 2
    assert reference.on_this_machine() is reference


@pytest.mark.parametrize("path", ["./absent", "/no/such/folder", "a/b/c"])
def test_a_missing_folder_is_named(path: str) -> None:
    with pytest.raises(ModelError, match="no model folder"):
        models.resolve(ModelSpec(path=path))


def test_an_unreachable_hub_model_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="cannot reach the hub"):
        models.resolve(ModelSpec(path="qresafe-tests/absent"))


def test_pickled_weights_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickle files.*save_pretrained"):
        models.load_model(copy)


def test_a_truncated_shard_is_found_before_loading(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(CorruptArtifactError, match="damaged weight file"):
        models.resolve(ModelSpec(path=str(copy)))


def test_a_missing_shard_and_a_path_that_leads_outside(copy: Path) -> None:
    index = {"weight_map": {"x": "model-00001-of-00001.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "model.safetensors").unlink()
    with pytest.raises(CorruptArtifactError, match="missing weight file model-00001"):
        models.check_folder(copy)
    index = {"weight_map": {"x": "../../../etc/passwd"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"names the file '\.\./\.\./\.\./etc/passwd'"):
        models.check_folder(copy)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_malformed_config_is_explained(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        models.resolve(ModelSpec(path=str(copy)))


def test_a_tokenizer_without_chat_template_is_refused(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        models.load_tokenizer(copy)


def test_the_pad_token_falls_back_to_the_end_token(copy: Path) -> None:
    path = copy / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("pad_token")
    path.write_text(json.dumps(config))
    tokenizer = models.load_tokenizer(copy)
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"


def test_a_model_that_lacks_a_weight_is_not_filled_at_random(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing .* model\.layers\.1\.mlp\.up"):
        models.load_model(copy)


def test_the_fingerprint_follows_the_weights_alone(copy: Path) -> None:
    before = models.fingerprint(copy)
    (copy / "README.md").write_text("notes")
    assert models.fingerprint(copy) == before
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert models.fingerprint(copy) != before


def test_what_lies_beside_the_codes_is_seen_on_remote_storage_too() -> None:
    folder = UPath("memory://beside/the/codes")
    folder.mkdir(parents=True)
    assert models.beside_the_codes(str(folder)) is None
    (folder / "critical16.safetensors").write_bytes(b"")
    assert models.beside_the_codes(str(folder)) == "critical16.safetensors"
