"""A patch of an AQLM model: trained through its codebooks, exported, and run by plain code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from patching import patch_spec
from test_export import RELOAD
from test_patch import OPTIONS, made_pairs

from qresafe.artifacts import Run
from qresafe.hf.checkpoint import QuantizedCheckpoint, load_dense
from qresafe.hf.models import resolve
from qresafe.hf.warm import ModelInput
from qresafe.quantize_specs import AqlmSpec, CalibrationSpec
from qresafe.specs import ModelSpec
from qresafe.stages import qpatch
from qresafe.stages.export import export
from qresafe.stages.patch import patch
from qresafe.stages.quantize import quantize

SPEC = AqlmSpec(
    codebook_bits=5,
    calibration=CalibrationSpec(risk="I", benign=16),
    rounds=1,
    finetune_steps=0,
)


def test_patch_export_reload_and_revert(tiny_llama: Path, tmp_path: Path) -> None:
    run = Run(str(tmp_path), "aqlm")
    made = quantize(run, ModelInput.of(resolve(ModelSpec(path=str(tiny_llama)))), SPEC)
    q0 = ModelInput.in_folder(made.path / "checkpoint", made.key)
    objective = {"dpo": 0.0, "kl": 0.0, "nll": 1.0, "anchor": 0.3}
    spec = patch_spec(objective=objective, batch_size=8, steps=6, lr=5e-2)
    patched = patch(run, q0=q0, pairs=made_pairs(run), reference=None, spec=spec, **OPTIONS)
    exported = export(run, made, patched)
    counts, checkpoint = exported.manifest.counts, exported.path / "checkpoint"
    assert counts["codes_changed"] > 0
    assert counts["checkpoint_bytes"] == counts["q0_bytes"]
    before, after = (QuantizedCheckpoint.open(a.path / "checkpoint") for a in (made, exported))
    changed = [
        name for name in before.files if not torch.equal(before.files[name], after.files[name])
    ]
    assert changed
    assert all(name.endswith(".codes") for name in changed)
    assert greedy_alone(checkpoint) == greedy_dense(checkpoint)
    qpatch.revert(exported.path / "patch.qpatch", Path(str(checkpoint)), tmp_path / "back")
    assert qpatch.file_hashes(tmp_path / "back") == qpatch.file_hashes(before.folder)


IDS = list(range(20, 40))


def greedy_alone(folder: object) -> list[int]:
    command = [sys.executable, "-I", "-c", RELOAD, str(folder), json.dumps(IDS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    tokens: list[int] = json.loads(done.stdout.splitlines()[-1])
    return tokens


def greedy_dense(folder: object) -> list[int]:
    model, _ = load_dense(str(folder))
    ids = torch.tensor([IDS])
    tokens = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    found: list[int] = tokens[0, len(IDS) :].tolist()
    return found
