"""Model folders that want more than to be a model: links, paths, pipes, endless templates, code."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from upath import UPath

from qresafe.errors import DataError, ModelError
from qresafe.hf import template_probe
from qresafe.hf.checkpoint import QuantizedCheckpoint
from qresafe.hf.models import check_folder, load_model, load_tokenizer, resolve
from qresafe.hf.template_probe import CPU_SECONDS, check_template
from qresafe.quantize_specs import RtnSpec
from qresafe.quantizers.rtn import quantize
from qresafe.specs import ModelSpec
from qresafe.storage import copy_tree
from tests.conftest import CHAT_TEMPLATE


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be spoiled, beside a file with a secret."""
    (tmp_path / "secret").write_text("the key of the house")
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


# ---- links, pipes, devices


@pytest.mark.parametrize("name", ["notes.txt", "tokenizer_config.json", "anything"])
@pytest.mark.parametrize("target", ["../secret", "/etc/hostname"])
def test_a_link_out_of_the_folder_is_refused(model: Path, name: str, target: str) -> None:
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(target)
    with pytest.raises(ModelError, match=f"{name} is a link out of the model's folder"):
        check_folder(model)


def test_what_a_link_leads_to_never_travels_into_a_checkpoint(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path, RtnSpec(bits=4, group_size=32))
    q0 = tmp_path / "checkpoint"
    opened = QuantizedCheckpoint.open(q0)
    (q0 / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="link out of"):
        QuantizedCheckpoint.open(q0)
    (q0 / "notes.txt").unlink()
    (q0 / "own.txt").symlink_to("config.json")
    copy = opened.rewrite(tmp_path / "copy", {})
    assert not any(b"key of the house" in f.read_bytes() for f in copy.iterdir())


def test_links_that_are_usual_are_followed(model: Path, tmp_path: Path) -> None:
    weights = model / "model.safetensors"
    weights.rename(tmp_path / "elsewhere.safetensors")
    weights.symlink_to(tmp_path / "elsewhere.safetensors")
    check_folder(model)
    # The hub's cache: snapshots/<commit>/<file> -> ../../blobs/<hash>
    hub = tmp_path / "models--a--b"
    (hub / "blobs").mkdir(parents=True)
    snapshot = Path(shutil.copytree(model, hub / "snapshots" / "abc"))
    (snapshot / "config.json").rename(hub / "blobs" / "123")
    (snapshot / "config.json").symlink_to("../../blobs/123")
    check_folder(snapshot)
    (snapshot / "notes.txt").symlink_to("../../../secret")
    with pytest.raises(ModelError, match=r"notes\.txt is a link out"):
        check_folder(snapshot)


def test_pipes_devices_and_broken_links_end_at_once(model: Path) -> None:
    config = (model / "config.json").read_text()
    began = time.monotonic()
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")
    with pytest.raises(ModelError, match=r"config\.json is a pipe or a device"):
        check_folder(model)
    (model / "config.json").unlink()
    (model / "config.json").write_text(config)
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("/dev/zero")
    with pytest.raises(ModelError, match="is a pipe or a device"):
        check_folder(model)
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("model.safetensors.gone")
    with pytest.raises(ModelError, match="link to nothing"):
        check_folder(model)
    assert time.monotonic() - began < 5


# ---- the index of shards


@pytest.mark.parametrize(
    "name",
    ["../elsewhere.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x\x00y", 3, {}, None],
)
def test_an_index_names_files_of_the_folder_only(model: Path, tmp_path: Path, name: Any) -> None:
    (model / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    for call in (check_folder, load_model):
        with pytest.raises(ModelError, match=r"index\.json names the file") as failure:
            call(model)
        assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    "text", ["[" * 50_000, "{}", "[]", '{"weight_map": 3}', "\x00", '{"weight_map": []}']
)
def test_a_malformed_index_is_refused(model: Path, text: str) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match="malformed model"):
        check_folder(model)


# ---- names on object stores


def test_a_name_that_leads_out_of_the_folder_is_not_copied(tmp_path: Path) -> None:
    source = UPath("memory://models/evil")
    # memory:// keeps names as they are, as object stores do.
    source.fs.store["/models/evil/config.json"] = _memory_file(source.fs, b"{}")
    source.fs.store["/models/evil/../../escaped"] = _memory_file(source.fs, b"gotcha")
    with pytest.raises(DataError, match="leads out of the folder"):
        copy_tree(source, UPath(tmp_path / "a" / "b"))
    assert not list(tmp_path.rglob("escaped"))


def _memory_file(files: Any, data: bytes) -> Any:
    from fsspec.implementations.memory import MemoryFile

    return MemoryFile(files, "x", data)


# ---- chat templates


def tokenizer(template: Any) -> Any:
    """Return as much of a tokenizer as `check_template` reads."""
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return SimpleNamespace(get_chat_template=lambda: template, special_tokens_map=special)


HOSTILE = {
    "endless": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "does not come to an end",
    ),
    "large": ("{{ 'a' * 10 ** 10 }}", "half a gibibyte"),
    "large at last": (
        "{% set n = namespace(t='a' * 999) %}{% for i in range(40) %}{% set n.t = n.t ~ n.t %}"
        "{% endfor %}{{ n.t | length }}",
        "half a gibibyte",
    ),
    "long": ("{% for i in range(99999) %}{{ 'a' * 20 }}{% endfor %}", "a million characters"),
    "a huge power": ("{{ 9 ** (9 ** (9 ** 9)) }}", "does not come to an end"),
    "only on a second turn": (
        "{% if messages | length > 2 %}{{ 'a' * 10 ** 10 }}{% endif %}",
        "half a gibibyte",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_template_cannot_hang_or_fill_the_memory(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_probe, "CPU_SECONDS", 1)
    template, said = HOSTILE[kind]
    with pytest.raises(ModelError, match=said):
        check_template(tokenizer(template), "m")


def test_the_limit_is_short() -> None:
    assert CPU_SECONDS + 1 < 10, "the kernel kills it a second after the limit at the latest"


@pytest.mark.parametrize(
    "template",
    [
        CHAT_TEMPLATE,
        "{{ raise_exception('no system prompt') }}",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ strftime_now('%Y') }}",
        "{% for m in messages %}{{ m | tojson }}{% break %}{% endfor %}",
        "{{ nonsense(",
        "{{ 1 / 0 }}",
    ],
)
def test_whatever_ends_soon_is_left_to_the_caller(template: str) -> None:
    check_template(tokenizer(template), "m")


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ messages[9].content.x }}", "{{ 'a' + 3 }}"]
)
def test_a_template_that_fails_in_any_way_is_one_sentence(model: Path, template: str) -> None:
    from qresafe.hf.chat import prompt_ids

    loaded = load_tokenizer(model)
    loaded.chat_template = template
    with pytest.raises(ModelError, match="the chat template fails"):
        prompt_ids(loaded, "Hello")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch planted') }}",
        "{{ messages.append({'role': 'system', 'content': 'planted'}) }}",
        "{{ self.__init__.__globals__ }}",
    ],
)
def test_a_template_reaches_nothing_outside(
    model: Path, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qresafe.hf.chat import prompt_ids

    monkeypatch.chdir(model)
    loaded = load_tokenizer(model)
    loaded.chat_template = template
    text = ""
    with contextlib.suppress(ModelError):  # it may also be refused
        text = loaded.decode(prompt_ids(loaded, "Hello"))
    assert "planted" not in text
    assert "class" not in text
    assert not (model / "planted").exists()


def test_a_folder_with_an_endless_template_is_refused_as_a_whole(model: Path) -> None:
    (model / "chat_template.jinja").write_text(HOSTILE["large"][0])
    with pytest.raises(ModelError, match="the chat template takes more") as failure:
        load_tokenizer(model)
    assert str(model) in str(failure.value)


# ---- code that comes with a model


def plant_code(model: Path) -> None:
    (model / "modeling_x.py").write_text("open('planted', 'w')\nclass X: pass\n")
    config = json.loads((model / "config.json").read_text())
    config |= {
        "model_type": "x",
        "auto_map": {"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "modeling_x.X"},
    }
    (model / "config.json").write_text(json.dumps(config))


def test_code_does_not_run_unless_it_is_trusted(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model)
    plant_code(model)
    with pytest.raises(ModelError, match=r"own Python code .* then set model\.trust_remote_code"):
        load_model(model)
    assert not (model / "planted").exists()


def test_trusting_code_says_what_it_means(model: Path) -> None:
    plant_code(model)
    with pytest.warns(
        UserWarning, match=r"trust_remote_code is on .*modeling_x\.py.* every worker"
    ):
        resolve(ModelSpec(path=str(model), trust_remote_code=True))
