"""LoRA above frozen low-bit weights on a tiny model: trained, deployed both ways, patched."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny_llama
from safetensors.torch import load_file, save_file
from upath import UPath

from qresafe.artifacts import Run
from qresafe.core.masked_lora import attach
from qresafe.errors import CorruptArtifactError, ModelError
from qresafe.hf.checkpoint import QuantizedCheckpoint, load_dense
from qresafe.hf.finetune import total_steps
from qresafe.hf.models import load_model, resolve
from qresafe.hf.warm import ModelInput
from qresafe.quantize_specs import BnbSpec, CalibrationSpec, QloraSpec, RtnSpec
from qresafe.quantizers.qlora import quantize
from qresafe.specs import ModelSpec
from qresafe.stages.export import export
from qresafe.stages.quantize import quantize as quantize_stage

IDS = torch.arange(10, 40)[None]
BASES = {
    "int4": RtnSpec(bits=4, group_size=32),
    "nf4": BnbSpec(double_quant=True),
    "int8": BnbSpec(format="int8"),
}
# Plain transformers, which finds adapter_config.json in the folder by itself.
RELOAD = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
print(model.generate(torch.arange(10, 40)[None], **options)[0, 30:].tolist())
"""


def spec(**changes: Any) -> QloraSpec:
    chats = CalibrationSpec(risk="III", benign=8, harmful=2)
    plain = {"rank": 4, "alpha": 8, "steps": 4, "batch_size": 5, "lr": 1e-2, "calibration": chats}
    return QloraSpec(**(plain | changes))


@pytest.fixture(scope="module")
def adapters(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, base in BASES.items():
        target = tmp_path_factory.mktemp(name)
        quantize(tiny_llama, target, spec(base=base, deploy="adapter"), control=False)
        made[name] = target / "checkpoint"
    return made


@pytest.mark.parametrize("name", BASES)
def test_the_adapter_is_deployed_as_it_is_decoded(adapters: dict[str, Path], name: str) -> None:
    dense, layers = load_dense(adapters[name])
    deployed = load_model(adapters[name])
    deployed.enable_input_require_grads()  # else bitsandbytes computes in bfloat16 on some CPUs
    ours, theirs = dense(IDS).logits, deployed(IDS).logits
    # W x + B (A x) against (W + B A) x; LLM.int8() rounds activations to 1/127 of their largest
    room = 0.5 if name == "int8" else 1e-4
    assert (ours - theirs).abs().max() < room
    for tensor in layers.values():
        assert torch.equal(tensor.grid.encode(tensor.dense()), tensor.codes)


def test_the_base_below_an_adapter_is_that_of_its_method(
    tiny_llama: Path, tmp_path: Path, adapters: dict[str, Path]
) -> None:
    from qresafe.quantizers.bnb import quantize as by_bitsandbytes

    by_bitsandbytes(tiny_llama, tmp_path, BASES["nf4"])
    alone = load_file(tmp_path / "checkpoint" / "model.safetensors")
    below = load_file(adapters["nf4"] / "model.safetensors")
    assert all(torch.equal(alone[name], below[name]) for name in alone)
    factors = load_file(adapters["nf4"] / "adapter_model.safetensors")
    assert all(value.abs().max() > 0 for value in factors.values())  # B starts at 0


def test_merged_is_the_decoded_sum_rounded_again(
    tiny_llama: Path, tmp_path: Path, adapters: dict[str, Path]
) -> None:
    quantize(tiny_llama, tmp_path, spec(base=BASES["int4"]), control=False)
    merged = QuantizedCheckpoint.open(tmp_path / "checkpoint")
    adapted = QuantizedCheckpoint.open(adapters["int4"])
    assert not (tmp_path / "checkpoint" / "adapter_config.json").exists()
    for name in merged.names:
        grid = merged.read(name).grid
        assert torch.equal(merged.read(name).codes, grid.encode(adapted.read(name).dense()))
    assert torch.equal(
        load_model(tmp_path / "checkpoint")(IDS).logits,
        load_dense(tmp_path / "checkpoint")[0](IDS).logits,
    )


def test_the_control_is_the_same_training_without_rounding(
    tiny_llama: Path, tmp_path: Path
) -> None:
    result = quantize(tiny_llama, tmp_path, spec(base=BASES["int4"], steps=12, lr=3e-2))
    assert result.control == tmp_path / "control"
    for losses in (result.counts["losses"], result.counts["control_losses"]):
        assert losses[-1] < 0.9 * losses[0]
    source = load_file(tiny_llama / "model.safetensors")
    control = load_file(tmp_path / "control" / "model.safetensors")
    moved = {name for name in source if not torch.equal(source[name], control[name])}
    names = QuantizedCheckpoint.open(tmp_path / "checkpoint").names
    assert moved == {f"{name}.weight" for name in names}
    assert not list(tmp_path.glob("tmp*"))


@pytest.mark.parametrize("deploy", ["adapter", "merged"])
def test_the_same_call_gives_the_same_bytes(tiny_llama: Path, tmp_path: Path, deploy: str) -> None:
    for name in ("a", "b"):
        wanted = spec(base=BASES["nf4"], deploy=deploy, steps=2)
        quantize(tiny_llama, tmp_path / name, wanted, control=False)
    quantize(tiny_llama, tmp_path / "a", wanted, control=False)  # as after a kill
    folders = [tmp_path / name / "checkpoint" for name in ("a", "b")]
    files = {file.name for folder in folders for file in folder.iterdir()}
    assert ("adapter_config.json" in files) == (deploy == "adapter")
    assert all(len({(f / name).read_bytes() for f in folders}) == 1 for name in files)


@pytest.mark.parametrize("name", ["int4", "nf4"])
def test_a_patch_starts_at_what_is_deployed(adapters: dict[str, Path], name: str) -> None:
    model, quantized = load_dense(adapters[name])
    before = model(IDS).logits
    options = {"rank": 2, "alpha": 2.0, "on": "weight", "through_grid": True, "seed": 0}
    layers = attach(model, quantized, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(model(IDS).logits, before, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(layers[n].codes(), quantized[n].codes) for n in layers)


def test_a_patched_adapter_loads_in_plain_transformers(tiny_llama: Path, tmp_path: Path) -> None:
    run = Run(str(tmp_path), "test")
    wanted = spec(base=BASES["int4"], deploy="adapter")
    source = ModelInput.of(resolve(ModelSpec(path=str(tiny_llama))))
    q0 = quantize_stage(run, source, wanted, control=False)
    assert q0.manifest.counts["bits_per_weight"] > 5.125  # 4 + 32 / 32 + 4 / 32, and the adapter
    base = QuantizedCheckpoint.open(q0.path / "checkpoint")
    tensors = {n: base.read(n) for n in base.names}
    codes = {n: t.grid.move(t.codes, torch.full(t.grid.shape, 0.3)) for n, t in tensors.items()}

    def work(folder: UPath) -> dict[str, int]:
        save_file(codes, str(folder / "codes.safetensors"))
        delta = {base.names[0]: torch.ones(tensors[base.names[0]].grid.shape)}
        save_file(delta, str(folder / "delta.safetensors"))
        return {}

    patch = run.stage("patch", spec={}, inputs={}, code_version=1, work=work)
    made = export(run, q0, patch)
    q = made.path / "checkpoint"
    unrounded = load_file(made.path / "unrounded" / "model.safetensors")
    name = base.names[0]
    torch.testing.assert_close(unrounded[f"{name}.weight"], tensors[name].dense() + 1)
    assert not (made.path / "unrounded" / "adapter_config.json").exists()  # merged into the sum
    same = load_file(q / "adapter_model.safetensors")
    before = load_file(q0.path / "checkpoint" / "adapter_model.safetensors")
    assert all(torch.equal(same[name], before[name]) for name in before)
    command = [sys.executable, "-I", "-c", RELOAD, str(q)]
    alone = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    ours = load_dense(q)[0].generate(IDS, **options)[0, 30:].tolist()
    assert json.loads(alone.splitlines()[-1]) == ours
    assert ours != load_dense(base.folder)[0].generate(IDS, **options)[0, 30:].tolist()


def test_adapters_that_cannot_be_read_are_refused(
    tmp_path: Path, adapters: dict[str, Path]
) -> None:
    import shutil

    folder = Path(shutil.copytree(adapters["int4"], tmp_path / "q"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ModelError, match=r"use_dora: True; patchable is plain LoRA"):
        QuantizedCheckpoint.open(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CorruptArtifactError, match="without weights"):
        QuantizedCheckpoint.open(folder)
    with pytest.raises(ModelError, match="without safetensors"):
        load_model(folder)


def test_targets_that_match_nothing_name_those_that_do(tmp_path: Path) -> None:
    source = save_tiny_llama(tmp_path)
    with pytest.raises(ModelError, match=r"no layer matches.*down_proj, gate_proj"):
        quantize(source, tmp_path / "q", spec(base=BASES["int4"], targets=("w1",)))


def test_epochs_are_passes_over_the_chats() -> None:
    assert total_steps(40, None, 100, 16) == 40
    assert total_steps(40, 2, 100, 16) == 14  # a pass is ceil(100 / 16) = 7 batches
    assert total_steps(40, 0.5, 10, 16) == 1
