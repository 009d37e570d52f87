"""GPTQ, AWQ and FP8: deployed as decoded, repeatable, calibrated on our own token ids."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from patching import move_codes_and_scales
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from qresafe.core.fp8 import E4M3
from qresafe.errors import ModelError
from qresafe.hf.checkpoint import QuantizedCheckpoint, load_dense
from qresafe.hf.models import load_model
from qresafe.progress import Silent
from qresafe.quantize_specs import AwqSpec, CalibrationSpec, Fp8Spec, GptqSpec, RtnSpec
from qresafe.quantizers.base import QuantizeResult
from qresafe.quantizers.calibrated import sequences
from qresafe.registry import quantizers
from qresafe.stages import qpatch

IDS = torch.arange(10, 40)[None]
FEW = {"calibration": CalibrationSpec(risk="I", benign=6), "max_length": 48}
Spec = GptqSpec | AwqSpec | Fp8Spec | RtnSpec


def gptq(**changes: object) -> GptqSpec:
    return GptqSpec.model_validate({"group_size": 32} | FEW | changes)


def awq(**changes: object) -> AwqSpec:
    return AwqSpec.model_validate({"group_size": 32} | FEW | changes)


def fp8(**changes: object) -> Fp8Spec:
    return Fp8Spec.model_validate({"activations": "none"} | FEW | changes)


def quantize(source: Path, target: Path, spec: Spec) -> QuantizeResult:
    return quantizers.get(spec.method)(source, target, spec)


WEIGHTS_ONLY = [
    *(gptq(bits=bits) for bits in (2, 3, 4, 8)),
    gptq(bits=4, symmetric=False, act_order="none"),
    gptq(bits=3, group_size=-1, symmetric=False),
    *(awq(bits=bits) for bits in (3, 4, 8)),
    awq(bits=4, group_size=-1, symmetric=True, duo_scaling=False),
    fp8(),
    fp8(scales="tensor"),
]


@pytest.mark.parametrize("spec", WEIGHTS_ONLY, ids=lambda s: f"{s.method}-{getattr(s, 'bits', 8)}")
@torch.no_grad()
def test_deployed_as_decoded_and_every_code_survives(
    tiny_llama: Path, tmp_path: Path, spec: Spec
) -> None:
    assert quantize(tiny_llama, tmp_path, spec).counts["layers"] == 14
    dense, layers = load_dense(tmp_path / "checkpoint")
    assert torch.equal(load_model(tmp_path / "checkpoint")(IDS).logits, dense(IDS).logits)
    for tensor in layers.values():
        assert torch.equal(tensor.grid.encode(tensor.dense()), tensor.codes)
        zeros = torch.zeros(tensor.grid.shape)
        assert torch.equal(tensor.grid.move(tensor.codes, zeros), tensor.codes)


@torch.no_grad()
def calibration_error(source: Path, checkpoint: Path) -> float:
    """Return the mean squared change of the logits on the calibration sequences."""
    before, (after, _) = load_model(source), load_dense(checkpoint)
    rows = [torch.tensor([ids]) for ids in sequences(source, gptq())]
    return sum(float((before(r).logits - after(r).logits).square().mean()) for r in rows)


@pytest.mark.parametrize("make", [gptq, awq])
def test_calibration_pays(tiny_llama: Path, tmp_path: Path, make: Callable[..., Spec]) -> None:
    spec = make(bits=4, symmetric=False)
    quantize(tiny_llama, tmp_path / "calibrated", spec)
    quantize(tiny_llama, tmp_path / "rounded", RtnSpec(bits=4, group_size=32))
    errors = {
        name: calibration_error(tiny_llama, tmp_path / name / "checkpoint")
        for name in ("calibrated", "rounded")
    }
    assert errors["calibrated"] < 0.95 * errors["rounded"]


@torch.no_grad()
def test_awq_folds_its_scales_into_the_layer_before(tiny_llama: Path, tmp_path: Path) -> None:
    quantize(tiny_llama, tmp_path, awq(bits=8))
    before = load_file(tiny_llama / "model.safetensors")
    checkpoint = QuantizedCheckpoint.open(tmp_path / "checkpoint")
    norm = "model.layers.0.input_layernorm.weight"
    scales = before[norm] / checkpoint.files[norm]
    assert not torch.allclose(scales, torch.ones_like(scales))
    # what the norm lost, its readers gained: their product is W's, up to 8-bit rounding
    query = "model.layers.0.self_attn.q_proj"
    restored = checkpoint.read(query).dense() / scales
    torch.testing.assert_close(restored, before[f"{query}.weight"], rtol=0, atol=0.02)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@torch.no_grad()
def test_fp8_activations_are_rounded_at_run_time(
    tiny_llama: Path, tmp_path: Path, kind: str
) -> None:
    quantize(tiny_llama, tmp_path, fp8(activations=kind))
    dense, _ = load_dense(tmp_path / "checkpoint")
    plain = dense(IDS).logits
    checkpoint = QuantizedCheckpoint.open(tmp_path / "checkpoint")
    for name in checkpoint.names:  # the rounding written out: by token, or by the stored scale
        stored = checkpoint.files[f"{name}.input_scale"] if kind == "static" else None
        dense.get_submodule(name).register_forward_pre_hook(rounded(stored))
    deployed = load_model(tmp_path / "checkpoint")(IDS).logits
    torch.testing.assert_close(deployed, dense(IDS).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(deployed, plain, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("scales", ["channel", "tensor"])
def test_a_patch_of_fp8_scales_goes_there_and_comes_back(
    tiny_llama: Path, tmp_path: Path, scales: str
) -> None:
    quantize(tiny_llama, tmp_path, fp8(scales=scales))
    base = tmp_path / "checkpoint"
    q0 = QuantizedCheckpoint.open(base)
    q = move_codes_and_scales(q0, tmp_path / "q")
    counts = qpatch.create(base, q, tmp_path / "p.qpatch")
    rows = [1 if scales == "tensor" else q0.read(name).grid.shape[0] for name in q0.names]
    assert counts["scales"] == sum(rows)
    assert 0.8 * sum(rows[::2]) < counts["scales_changed"] <= sum(rows[::2])
    qpatch.apply(tmp_path / "p.qpatch", base, tmp_path / "applied")
    qpatch.revert(tmp_path / "p.qpatch", tmp_path / "applied", tmp_path / "reverted")
    for made, meant in (("applied", q), ("reverted", base)):
        files = [folder / "model.safetensors" for folder in (tmp_path / made, meant)]
        assert files[0].read_bytes() == files[1].read_bytes()
    deployed, decoded = load_model(q)(IDS).logits, load_dense(q)[0](IDS).logits
    torch.testing.assert_close(deployed, decoded, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(deployed, load_model(base)(IDS).logits, rtol=1e-2, atol=1e-2)


def rounded(stored: torch.Tensor | None):  # type: ignore[no-untyped-def]
    def hook(_: object, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x = inputs[0]
        scale = x.abs().amax(-1, keepdim=True) / 448 if stored is None else stored
        return ((x / scale).clamp(-448, 448).to(E4M3).to(x.dtype) * scale, *inputs[1:])

    return hook


@pytest.mark.parametrize("spec", [gptq(), awq(), fp8(activations="static")], ids=lambda s: s.method)
def test_the_same_call_gives_the_same_bytes_and_leaves_nothing_behind(
    tiny_llama: Path,
    tmp_path: Path,
    spec: Spec,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("a", "b"):
        quantize(tiny_llama, tmp_path / name, spec)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "|" not in printed.err  # no bars, no log lines
    assert os.listdir() == []
    files = [sorted((tmp_path / name / "checkpoint").iterdir()) for name in ("a", "b")]
    assert [f.name for f in files[0]] == [f.name for f in files[1]]
    for one, other in zip(*files, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name
    assert "recipe.yaml" not in {file.name for file in files[0]}


def test_gptq_equals_the_direct_call_on_the_same_ids(tiny_llama: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    spec = gptq(group_size=64, skip=("lm_head", "down_proj"))
    quantize(tiny_llama, tmp_path, spec)
    rows = sequences(tiny_llama, spec)
    assert {len(row) for row in rows} == {48}  # all are cut: the library keeps their order
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * 48] * len(rows)})
    weights = {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 64}
    group = {"targets": ["Linear"], "weights": weights}
    recipe = GPTQModifier(config_groups={"group_0": group}, ignore=["lm_head", "re:.*down_proj"])
    model = load_model(tiny_llama)
    oneshot(model=model, dataset=data, recipe=recipe, shuffle_calibration_samples=False)
    model.save_pretrained(tmp_path / "theirs", save_compressed=True)
    ours, theirs = (QuantizedCheckpoint.open(tmp_path / n) for n in ("checkpoint", "theirs"))
    assert ours.names == theirs.names
    assert not any("down_proj" in name for name in ours.names)
    for name in ours.names:
        assert torch.equal(ours.read(name).codes, theirs.read(name).codes)


def test_other_chats_give_other_codes(tiny_llama: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        quantize(tiny_llama, tmp_path / str(seed), gptq(seed=seed, bits=3))
    a, b = (QuantizedCheckpoint.open(tmp_path / n / "checkpoint") for n in "01")
    assert any(not torch.equal(a.read(name).codes, b.read(name).codes) for name in a.names)


def test_sequences_are_whole_chats_cut_at_the_end(tiny_llama: Path) -> None:
    long = sequences(tiny_llama, gptq(max_length=2048, sequences=4))
    short = sequences(tiny_llama, gptq(max_length=20, sequences=4))
    assert len(long) == len(short) == 4
    assert [row[:20] for row in long] == short
    assert all(row[-1] == 2 for row in long)  # the end token of the answer


class Counting(Silent):
    def __init__(self) -> None:
        self.total, self.done = 0, 0

    def start(self, stage: str, total: int | None = None, unit: str = "") -> None:
        self.total = total or 0

    def advance(self, done: int = 1, note: str = "") -> None:
        self.done += done


@pytest.mark.parametrize("spec", [gptq(), fp8()], ids=lambda s: s.method)
def test_progress_counts_layers(tiny_llama: Path, tmp_path: Path, spec: Spec) -> None:
    shown = Counting()
    quantizers.get(spec.method)(tiny_llama, tmp_path, spec, progress=shown)
    assert (shown.total, shown.done) == (14, 14)


def test_a_group_that_does_not_fit_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"64 inputs of .* group_size 48 .* 32 or 16 or -1"):
        quantize(tiny_llama, tmp_path, awq(group_size=48))
    with pytest.raises(ValidationError, match=r"none.*static"):
        gptq(act_order="group")
    assert not any(tmp_path.iterdir())


def test_awq_that_would_only_round_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    # o_proj could take v_proj's scales, but has other widths here (grouped queries).
    others = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
    with pytest.raises(ModelError, match=r"would only round.*gptq or rtn"):
        quantize(tiny_llama, tmp_path, awq(skip=("lm_head", *others)))
    assert not any(tmp_path.iterdir())


def test_a_damaged_weight_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "w"
    source.mkdir()
    for file in tiny_llama.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1\.mlp\.up_proj has weights that are not finite"):
        quantize(source, tmp_path / "q", gptq())
    assert not (tmp_path / "q" / "checkpoint").exists()


def test_groups_that_transformers_would_misread_are_refused(
    tiny_llama: Path, tmp_path: Path
) -> None:
    quantize(tiny_llama, tmp_path, gptq())
    weights = load_file(tmp_path / "checkpoint" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    weights[f"{name}.weight_g_idx"] = torch.arange(64, dtype=torch.int32) % 2
    save_file(weights, tmp_path / "checkpoint" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"re-ordered groups \(g_idx\)"):
        QuantizedCheckpoint.open(tmp_path / "checkpoint")


def test_codes_that_mean_nan_are_never_written(tiny_llama: Path, tmp_path: Path) -> None:
    quantize(tiny_llama, tmp_path, fp8())
    checkpoint = QuantizedCheckpoint.open(tmp_path / "checkpoint")
    name = checkpoint.names[0]
    codes = checkpoint.read(name).codes.clone()
    for nan, message in ((-1, "means NaN"), (127, r"outside \[-128, 126\]")):
        codes[0, 0] = nan
        with pytest.raises(ModelError, match=message):
            checkpoint.rewrite(tmp_path / "q", {name: codes})
    assert not (tmp_path / "q").exists()
