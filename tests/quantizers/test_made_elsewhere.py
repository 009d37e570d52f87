"""A checkpoint made elsewhere as Q0: recorded by content, linked, patched and exported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import save_tiny_llama
from foreign import write_awq, write_gguf, write_gptq
from gguf import GGMLQuantizationType, quants
from patching import made_pairs, patch_spec
from transformers import AutoModelForCausalLM
from upath import UPath

from qresafe.artifacts import Artifact, Run
from qresafe.errors import CorruptArtifactError, DataError, ModelError
from qresafe.hf.checkpoint import QuantizedCheckpoint, load_dense
from qresafe.hf.models import load_model, load_tokenizer, resolve
from qresafe.hf.warm import ModelInput
from qresafe.loading import load_spec
from qresafe.progress import Silent
from qresafe.quantize_specs import CheckpointSpec, RtnSpec
from qresafe.specs import ExperimentSpec, ModelSpec
from qresafe.stages.experiment import Experiment
from qresafe.stages.export import export
from qresafe.stages.patch import patch
from qresafe.stages.quantize import check_ready, quantize
from qresafe.stages.runtime import InProcessRuntime

IDS = torch.arange(10, 40)[None]
Q4_0 = GGMLQuantizationType.Q4_0
MAKERS: dict[str, Callable[[Path, Path], object]] = {
    "gptq": lambda target, source: write_gptq(target, source, desc_act=True),
    "awq": write_awq,
    "q4_0.gguf": lambda target, source: write_gguf(
        target, source, lambda values: (quants.quantize(values, Q4_0), Q4_0)
    ),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QRESAFE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def teacher(tiny_llama: Path) -> ModelInput:
    return ModelInput.of(resolve(ModelSpec(path=str(tiny_llama))))


def staged(run: Run, teacher: ModelInput, path: Path) -> Artifact:
    spec = CheckpointSpec(path=str(path))
    check_ready(spec, teacher)
    return quantize(run, teacher, spec)


@pytest.mark.filterwarnings("ignore:.*decoded weights")
@pytest.mark.parametrize("kind", MAKERS)
def test_it_is_patched_exported_and_loaded_again(
    teacher: ModelInput, tmp_path: Path, kind: str
) -> None:
    MAKERS[kind](tmp_path / kind, Path(teacher.ref.path))
    run = Run(str(tmp_path), "t")
    made = staged(run, teacher, tmp_path / kind)
    assert made.manifest.counts["layers"] == 14
    runs = made.manifest.counts.get("runs", "")
    assert ("run with decoded weights: gptqmodel" in runs) == (not kind.endswith("gguf"))
    q0 = ModelInput.in_folder(made.path / "checkpoint", made.key)
    spec = patch_spec(objective={"nll": 1.0, "anchor": 0.5}, steps=4, lr=3e-2)
    options = {"runtime": InProcessRuntime(), "progress": Silent()}
    trained = patch(run, q0=q0, pairs=made_pairs(run), reference=None, spec=spec, **options)
    exported = export(run, made, trained)
    counts = exported.manifest.counts
    assert counts["codes_changed"] > 0
    assert counts["checkpoint_bytes"] == counts["q0_bytes"]
    folder = Path(str(exported.path)) / "checkpoint"
    deployed, (dense, _) = load_model(folder), load_dense(folder)
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(deployed.generate(IDS, **greedy), dense.generate(IDS, **greedy))
    assert not torch.equal(deployed(IDS).logits, load_model(Path(q0.ref.path))(IDS).logits)
    assert load_tokenizer(folder).chat_template
    if kind.endswith("gguf"):  # plain transformers, without qresafe's config
        plain = AutoModelForCausalLM.from_pretrained(folder, gguf_file=kind)
        assert torch.equal(plain(IDS).logits, dense(IDS).logits)


def test_files_are_linked_and_the_content_is_the_key(teacher: ModelInput, tmp_path: Path) -> None:
    write_awq(tmp_path / "q", Path(teacher.ref.path))
    run = Run(str(tmp_path), "t")
    made = staged(run, teacher, tmp_path / "q")
    weights = Path(str(made.path)) / "checkpoint" / "model.safetensors"
    assert weights.samefile(tmp_path / "q" / "model.safetensors")
    before = weights.read_bytes()
    q0 = QuantizedCheckpoint.open(weights.parent)
    q0.rewrite(tmp_path / "patched", {q0.names[0]: -1 - q0.read(q0.names[0]).codes})
    assert weights.read_bytes() == before  # a patch never writes through the link
    shutil.copytree(tmp_path / "q", tmp_path / "moved")
    assert staged(run, teacher, tmp_path / "moved").reused  # the same content
    (tmp_path / "q" / "config.json").write_text(
        (tmp_path / "q" / "config.json").read_text().replace('"bits": 4', '"bits":  4')
    )
    assert staged(run, teacher, tmp_path / "q").key != made.key


def test_what_is_not_w_quantized_is_refused(teacher: ModelInput, tmp_path: Path) -> None:
    run = Run(str(tmp_path), "t")

    def refused(path: Path | str, message: str, kind: type[Exception] = ModelError) -> None:
        with pytest.raises(kind, match=message):
            staged(run, teacher, Path(path))

    refused(tmp_path / "nothing", "no model folder .* in quantize.path")
    refused(teacher.ref.path, "not quantized")
    write_awq(tmp_path / "large", save_tiny_llama(tmp_path / "w", hidden=128))
    refused(tmp_path / "large", "another model than W: its hidden_size is 128, not 64")
    MAKERS["q4_0.gguf"](tmp_path / "large.gguf", tmp_path / "w")
    refused(tmp_path / "large.gguf", "hidden_size is 128, not 64")
    write_awq(tmp_path / "q", Path(teacher.ref.path))
    config = tmp_path / "q" / "config.json"
    whole = config.read_text()
    config.write_text(whole.replace('"gemm"', '"gemv"'))
    refused(tmp_path / "q", "version 'gemv'")
    config.write_text(whole.replace('"awq"', '"exl2"'))
    refused(tmp_path / "q", "'exl2' is not supported")
    config.write_text(whole)
    template = tmp_path / "q" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    refused(tmp_path / "q", "chat templates", DataError)
    weights = tmp_path / "q" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    refused(tmp_path / "q", "damaged weight file", CorruptArtifactError)


def test_block_scaled_fp8_is_assessed_and_not_patched(teacher: ModelInput, tmp_path: Path) -> None:
    """One 128x128 block per layer: each weight is its code times one scale."""
    source = Path(teacher.ref.path)
    scales = write_fp8(tmp_path / "q", source)
    made = staged(Run(str(tmp_path), "t"), teacher, tmp_path / "q")
    assert "can be assessed, not patched" in made.manifest.counts["not_patchable"]
    given = {"model": {"path": str(source)}, "quantize": CheckpointSpec(path=str(tmp_path / "q"))}
    spec = ExperimentSpec(storage=str(tmp_path), name="t", **given)
    experiment = Experiment(spec, InProcessRuntime())
    assert experiment.arms == ("W", "Q0")
    with pytest.raises(ModelError, match="can be assessed, not patched"):
        _ = experiment.patched  # before the models answer anything
    assert [name for name, _ in experiment.stages] == ["quantize"]
    model, full = load_model(made.path / "checkpoint"), load_model(source)
    for name, scale in scales.items():
        weight = full.get_submodule(name).weight
        expected = (weight / scale).to(torch.float8_e4m3fn).float() * scale
        found = model.get_submodule(name).weight.float()
        # transformers decodes to bfloat16: 8 bits of precision
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-6)


def write_fp8(target: Path, source: Path) -> dict[str, float]:
    """Write a fine-grained FP8 checkpoint; return each layer's one scale."""
    from foreign import write

    found: list[float] = []

    def layer(weight: torch.Tensor) -> dict[str, object]:
        scale = float(weight.abs().max() / 448)  # the largest E4M3
        found.append(scale)
        codes = (weight / scale).to(torch.float8_e4m3fn)
        scales = torch.full((1, -(-weight.shape[1] // 128)), scale)
        return {"weight": codes, "weight_scale_inv": scales, "expected": weight}

    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    names = write(target, source, config | {"activation_scheme": "dynamic"}, layer)
    return dict(zip(names, found, strict=True))


def test_a_preset_s_own_method_gives_way() -> None:
    preset = {"quantize": {"method": "llm_qat", "bits": 8, "calibration": {"risk": "II"}}}
    given = ["quantize.method=checkpoint", "quantize.path=/q"]
    for order in (given, given[::-1]):
        assert load_spec(ExperimentSpec, preset, order).quantize == CheckpointSpec(path="/q")
    assert load_spec(ExperimentSpec, preset, ["quantize.method=rtn"]).quantize == RtnSpec(bits=8)


def test_a_stage_s_files_are_whole_after_a_kill(teacher: ModelInput, tmp_path: Path) -> None:
    write_awq(tmp_path / "q", Path(teacher.ref.path))
    run = Run(str(tmp_path), "t")
    made = staged(run, teacher, tmp_path / "q")
    files = json.dumps(made.manifest.files, sort_keys=True)
    (UPath(made.path) / "DONE").unlink()  # as a kill just before the end leaves it
    again = staged(run, teacher, tmp_path / "q")
    assert not again.reused
    assert json.dumps(again.manifest.files, sort_keys=True) == files
