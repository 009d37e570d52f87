"""Export: Q on Q0's grid in Q0's files, checked after reloading them without qresafe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from upath import UPath

from qresafe.artifacts import Artifact, Run
from qresafe.errors import ModelError
from qresafe.hf.chat import prompt_ids
from qresafe.hf.checkpoint import QuantizedCheckpoint, load_dense
from qresafe.hf.models import load_model, load_tokenizer, resolve
from qresafe.hf.warm import ModelInput
from qresafe.quantize_specs import BnbSpec, QuantizeSpec, RtnSpec
from qresafe.specs import ModelSpec
from qresafe.stages.export import export
from qresafe.stages.quantize import quantize

# Runs in an isolated interpreter in which importing qresafe fails: what a user's own server does.
RELOAD = """
import sys
class NoQresafe:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "qresafe":
            raise ImportError("qresafe must not be needed")
sys.meta_path.insert(0, NoQresafe())
import json, torch, transformers
folder, ids = sys.argv[1], json.loads(sys.argv[2])
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
tokens = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None)
assert not any(name.startswith("qresafe") for name in sys.modules)
print(json.dumps(tokens[0, len(ids):].tolist()))
"""


def small_patch(q0: QuantizedCheckpoint) -> tuple[dict[str, torch.Tensor], ...]:
    """Return codes and deltas that move every 50th weight of some layers by two steps or so."""
    codes, deltas = {}, {}
    for name in q0.names[1::2]:
        tensor = q0.read(name)
        dense = tensor.dense()
        delta = torch.zeros(dense.shape)
        delta.view(-1)[::50] = 0.4 * dense.abs().max()
        codes[name], deltas[name] = tensor.grid.move(tensor.codes, delta), delta
    return codes, deltas


def exported(tiny_llama: Path, storage: Path, spec: QuantizeSpec) -> tuple[Artifact, Artifact]:
    run = Run(str(storage), "test")
    q0 = quantize(run, ModelInput.of(resolve(ModelSpec(path=str(tiny_llama)))), spec)
    codes, deltas = small_patch(QuantizedCheckpoint.open(q0.path / "checkpoint"))

    def work(folder: UPath) -> dict[str, int]:
        save_file(codes, str(folder / "codes.safetensors"))
        save_file(deltas, str(folder / "delta.safetensors"))
        return {}

    inputs = {"q0": q0.key}
    patch = run.stage("patch", spec={}, inputs=inputs, code_version=1, work=work)
    return q0, export(run, q0, patch)


@pytest.fixture(scope="module")
def int4(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    return exported(tiny_llama, tmp_path_factory.mktemp("int4"), RtnSpec(bits=4, group_size=32))


def test_the_checkpoint_runs_without_qresafe_as_its_dense_decode(
    tiny_llama: Path, int4: tuple[Artifact, Artifact]
) -> None:
    q0, q = int4
    ids = prompt_ids(load_tokenizer(tiny_llama), "how do I bake bread?")
    command = [sys.executable, "-I", "-c", RELOAD, str(q.path / "checkpoint"), json.dumps(ids)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    alone = json.loads(done.stdout.splitlines()[-1])

    def greedy(folder: UPath) -> list[int]:
        model, _ = load_dense(folder)
        tokens = model.generate(
            torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        return tokens[0, len(ids) :].tolist()

    assert alone == greedy(q.path / "checkpoint")
    assert alone != greedy(q0.path / "checkpoint")  # the patch shows, or the test shows nothing


def test_counts_are_those_of_the_codes(int4: tuple[Artifact, Artifact]) -> None:
    q0, q = int4
    before, after = (QuantizedCheckpoint.open(a.path / "checkpoint") for a in (q0, q))
    changed = {
        name: int((before.read(name).codes != after.read(name).codes).sum())
        for name in before.names
    }
    counts = q.manifest.counts
    total = sum(before.read(name).codes.numel() for name in before.names)
    assert counts["changed_by_layer"] == changed
    assert counts["codes"] == total
    assert counts["fraction_changed"] == sum(changed.values()) / total > 0
    assert counts["patch_bytes"] == (q.path / "patch.qpatch").stat().st_size
    assert counts["checkpoint_bytes"] == counts["q0_bytes"]
    assert 0 < counts["bytes_per_changed_code"] <= 2.5


def test_the_unrounded_model_is_q0_plus_the_change(int4: tuple[Artifact, Artifact]) -> None:
    q0, q = int4
    base = QuantizedCheckpoint.open(q0.path / "checkpoint")
    _, deltas = small_patch(base)
    model = load_model(q.path / "unrounded")
    for name in base.names:
        expected = base.read(name).dense() + deltas.get(name, 0)
        assert torch.equal(model.get_submodule(name).weight, expected)


def test_a_second_run_reuses_the_export(tiny_llama: Path, int4: tuple[Artifact, Artifact]) -> None:
    storage = Path(str(int4[1].path)).parents[3]
    q0, q = exported(tiny_llama, storage, RtnSpec(bits=4, group_size=32))
    assert q0.reused
    assert q.reused


def test_nf4_is_exported_in_its_own_format(tiny_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    q0, q = exported(tiny_llama, tmp_path, BnbSpec(format="nf4", double_quant=True))
    codes, _ = small_patch(QuantizedCheckpoint.open(q0.path / "checkpoint"))
    made = QuantizedCheckpoint.open(q.path / "checkpoint")
    assert all(torch.equal(made.read(name).codes, codes[name]) for name in codes)
    assert load_model(q.path / "checkpoint").is_loaded_in_4bit


def test_remote_storage_gets_the_same_files(tiny_llama: Path, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("QRESAFE_CACHE", str(tmp_path / "cache"))
    local = Run(str(tmp_path), "a")
    remote = Run("memory://qresafe-test", "a")
    model = ModelInput.of(resolve(ModelSpec(path=str(tiny_llama))))
    here, there = (quantize(run, model, RtnSpec()) for run in (local, remote))
    assert here.manifest.files == there.manifest.files
    assert QuantizedCheckpoint.open(there.path / "checkpoint").names


def test_codes_for_another_model_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    run = Run(str(tmp_path), "test")
    model = ModelInput.of(resolve(ModelSpec(path=str(tiny_llama))))
    q0 = quantize(run, model, RtnSpec())

    def work(folder: UPath) -> dict[str, int]:
        alien = {"model.layers.9.mlp.up_proj": torch.zeros(2, 2, dtype=torch.int8)}
        save_file(alien, str(folder / "codes.safetensors"))
        return {}

    patch = run.stage("patch", spec={}, inputs={}, code_version=1, work=work)
    with pytest.raises(ModelError, match=r"no quantized layer 'model\.layers\.9"):
        export(run, q0, patch)
