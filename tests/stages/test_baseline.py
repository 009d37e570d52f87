"""Baselines leave what a patch leaves, on Q0's grid, and deploy by the same export."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from qresafe.errors import DataError, UserError
from qresafe.hf.checkpoint import QuantizedCheckpoint
from qresafe.loading import load_spec
from qresafe.specs import ExperimentSpec
from qresafe.stages.experiment import Experiment
from qresafe.stages.patch_output import read_tensors
from qresafe.stages.runtime import InProcessRuntime


def experiment(
    storage: Path, w: Path, method: str, updates: str = "lora", **pool: object
) -> Experiment:
    few = {"harmful": 4, "benign": 2, "borderline": 2, "recombined": 0, "max_new_tokens": 8}
    spec = {
        "storage": str(storage),
        "model": {"path": str(w)},
        "quantize": {"method": "rtn", "bits": 2, "group_size": 32},
        "pairs": few | {"keep": "different"} | pool,
        "patch": {
            "method": method,
            "updates": updates,
            "steps": 3,
            "batch_size": 4,
            "lr": 0.02,
            "rank": 2,
        },
    }
    return Experiment(load_spec(ExperimentSpec, spec), InProcessRuntime(threads=1))


@pytest.mark.parametrize("updates", ["lora", "full"])
@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_a_baseline_is_trained_rounded_and_exported(
    method: str, updates: str, tmp_path: Path, tiny_llama: Path
) -> None:
    made = experiment(tmp_path, tiny_llama, method, updates)
    folder = made.patched.path
    assert made.reference is None  # TRL takes its own
    codes, delta = (read_tensors(folder / f"{name}.safetensors") for name in ("codes", "delta"))
    q0 = QuantizedCheckpoint.open(made.quantized.path / "checkpoint")
    q = QuantizedCheckpoint.open(made.exported.path / "checkpoint")
    assert set(codes) == set(q0.names)
    changed = total = 0
    for name in q0.names:
        before = q0.read(name)
        assert torch.equal(q.read(name).codes, codes[name])
        # Rounded to the nearest point: no code further from the trained weight than half a step,
        # save where the grid ends.
        step = before.grid.scale.repeat_interleave(32, dim=1)
        miss = (before.grid.decode(codes[name]) - before.dense() - delta[name]).abs()
        inside = (codes[name] > -2) & (codes[name] < 1)
        assert bool((miss <= step / 2 + 1e-6)[inside].all())
        changed += int((codes[name] != before.codes).sum())
        total += codes[name].numel()
    assert any(bool(tensor.abs().max() > 0) for tensor in delta.values())
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [record["step"] for record in history] == [1, 2, 3]
    assert np.isclose(history[-1]["codes_changed"], changed / total)
    assert made.patched.manifest.counts["codes_changed"] == history[-1]["codes_changed"]
    # The change of a LoRA adapter of rank 2 is a matrix of rank 2; of all weights it is not.
    ranks = {int(torch.linalg.matrix_rank(tensor, rtol=1e-3)) for tensor in delta.values()}
    assert max(ranks) == 2 if updates == "lora" else max(ranks) > 2
    assert experiment(tmp_path, tiny_llama, method, updates).patched.reused


def test_dpo_without_a_preference_says_so(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(DataError, match="no row to train the baseline on"):
        _ = experiment(tmp_path, tiny_llama, "dpo", harmful=0).patched


def test_full_updates_are_of_the_baselines() -> None:
    with pytest.raises(UserError, match="updates: full is of methods dpo and sft"):
        load_spec(ExperimentSpec, {"patch": {"updates": "full"}})
