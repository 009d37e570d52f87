"""A discrete patch as a stage: exported, applied and reverted like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qresafe.errors import SpecError
from qresafe.hf.checkpoint import QuantizedCheckpoint
from qresafe.loading import load_spec
from qresafe.specs import ExperimentSpec
from qresafe.stages import qpatch
from qresafe.stages.experiment import Experiment
from qresafe.stages.patch_output import read_tensors
from qresafe.stages.runtime import InProcessRuntime

FLIPS = {"rounds": 3, "at_once": 6, "at_least": 2, "rows": 4, "probe_rows": 8}


def experiment(storage: Path, w: Path, quantize: dict[str, Any], **patch: Any) -> Experiment:
    few = {"harmful": 4, "benign": 2, "borderline": 2, "recombined": 0, "max_new_tokens": 8}
    spec = {
        "storage": str(storage),
        "model": {"path": str(w)},
        "quantize": quantize,
        "pairs": few | {"keep": "different"},
        "patch": {"method": "flips", "flips": FLIPS} | patch,
    }
    return Experiment(load_spec(ExperimentSpec, spec), InProcessRuntime(threads=1))


@pytest.mark.parametrize(
    "quantize",
    [{"method": "rtn", "bits": 2, "group_size": 32}, {"method": "bnb", "format": "nf4"}],
    ids=["int2", "nf4"],
)
def test_flips_are_exported_applied_and_reverted(
    quantize: dict[str, Any], tmp_path: Path, tiny_llama: Path
) -> None:
    made = experiment(tmp_path, tiny_llama, quantize)
    made.check()
    assert made.reference is None
    codes = read_tensors(made.patched.path / "codes.safetensors")
    history = (made.patched.path / "history.jsonl").read_text().splitlines()
    q0 = QuantizedCheckpoint.open(made.quantized.path / "checkpoint")
    q = QuantizedCheckpoint.open(made.exported.path / "checkpoint")
    changed = 0
    for name in q0.names:
        assert torch.equal(q.read(name).codes, codes[name])
        changed += int((codes[name] != q0.read(name).codes).sum())
    counts = made.exported.manifest.counts
    assert counts["codes_changed"] == changed == json.loads(history[-1])["flips"] > 0
    assert counts["checkpoint_bytes"] == counts["q0_bytes"]
    # There is nothing before rounding, so no adapter is exported or measured.
    assert "adapter" not in made.arms
    assert not (made.exported.path / "unrounded").exists()
    back = tmp_path / "back"
    patched = Path(str(made.exported.path / "checkpoint"))
    qpatch.revert(Path(str(made.exported.path / "patch.qpatch")), patched, back)
    assert qpatch.file_hashes(back) == qpatch.file_hashes(q0.folder)
    assert experiment(tmp_path, tiny_llama, quantize).patched.reused


def test_settings_of_flips_leave_the_keys_of_other_patches_alone(tmp_path: Path) -> None:
    from qresafe.specs import PatchSpec
    from qresafe.stages.patch import key_spec, needs_reference

    assert key_spec(PatchSpec()) == key_spec(PatchSpec(flips={"rounds": 7}))
    flips = [PatchSpec(method="flips", flips={"rounds": n}) for n in (7, 8)]
    assert key_spec(flips[0]) != key_spec(flips[1])
    dpo = {"dpo": 1.0, "kl": 0.0}
    assert needs_reference(PatchSpec(method="flips", objective=dpo))
    assert not needs_reference(PatchSpec(method="flips", mask={"loss": "dpo"}))


def test_additive_codes_are_refused_before_anything_runs(tmp_path: Path, tiny_llama: Path) -> None:
    made = experiment(tmp_path, tiny_llama, {"method": "aqlm"})
    with pytest.raises(SpecError, match=r"AQLM stands for several weights.*masked_lora"):
        made.check()
    assert not made.stages


def test_every_kind_without_a_weight_is_refused(tmp_path: Path) -> None:
    kinds = {"harmful": 0, "benign": 0, "borderline": 0, "recombined": 0}
    with pytest.raises(SpecError, match="every kind has weight 0"):
        experiment(tmp_path, tmp_path, {"method": "rtn"}, flips={"kinds": kinds})
