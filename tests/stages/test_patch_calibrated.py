"""Patch, export and reload of what llm-compressor made: same format, same size, same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from patching import patch_spec, random_pairs
from upath import UPath

from qresafe.artifacts import Run
from qresafe.hf.checkpoint import QuantizedCheckpoint, load_dense
from qresafe.hf.models import load_model, resolve
from qresafe.hf.warm import ModelInput
from qresafe.progress import Silent
from qresafe.quantize_specs import AwqSpec, CalibrationSpec, Fp8Spec, GptqSpec, QuantizeSpec
from qresafe.specs import ModelSpec
from qresafe.stages.export import export
from qresafe.stages.patch import patch
from qresafe.stages.quantize import quantize
from qresafe.stages.reference import reference
from qresafe.stages.runtime import InProcessRuntime, write_table

OPTIONS = {"runtime": InProcessRuntime(), "progress": Silent()}
FEW = {"calibration": CalibrationSpec(risk="I", benign=4), "max_length": 48}
SPECS = [
    GptqSpec(bits=3, group_size=32, **FEW),
    AwqSpec(bits=4, group_size=32, **FEW),
    Fp8Spec(activations="none"),
]


@torch.no_grad()
def greedy(model: Any) -> list[int]:
    prompt = torch.arange(10, 40)[None]
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    return model.generate(prompt, **settings)[0, 30:].tolist()


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.method)
def test_patched_in_its_own_format(tiny_llama: Path, tmp_path: Path, spec: QuantizeSpec) -> None:
    run = Run(str(tmp_path), "t")
    made = quantize(run, ModelInput.of(resolve(ModelSpec(path=str(tiny_llama)))), spec)
    q0 = ModelInput.in_folder(made.path / "checkpoint", "q0")

    def write_pairs(folder: UPath) -> dict[str, Any]:
        write_table(folder / "pairs.parquet", random_pairs())
        return {}

    pairs = run.stage("pairs", spec={}, inputs={}, code_version=1, work=write_pairs)
    scored = reference(run, q0=q0, pairs=pairs, batch_size=4, **OPTIONS)
    trained = patch(
        run, q0=q0, pairs=pairs, reference=scored, spec=patch_spec(lr=5e-2, steps=6), **OPTIONS
    )
    q = export(run, made, trained, unrounded=False)
    counts = q.manifest.counts
    assert counts["fraction_changed"] > 0
    assert counts["checkpoint_bytes"] == counts["q0_bytes"]
    folders = [artifact.path / "checkpoint" for artifact in (made, q)]
    before, after = (QuantizedCheckpoint.open(folder) for folder in folders)
    for name in set(before.files) - {before.codec.pack(n, before.read(n).codes)[0] for n in before}:
        assert torch.equal(before.files[name], after.files[name]), name  # scales and the rest
    dense, _ = load_dense(folders[1])
    tokens = greedy(load_model(folders[1]))
    assert tokens == greedy(dense)
    assert tokens != greedy(load_model(folders[0]))  # the patch shows, or the test shows nothing
