"""The loop's promises: nothing outside the mask moves, and a kill changes no bit."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from patching import (
    patch_inputs,
    patch_spec,
    quantize_in_place,
    random_pairs,
    reference_of,
    tiny_model,
)
from upath import UPath

from qresafe import records
from qresafe.errors import UserError
from qresafe.progress import Silent
from qresafe.specs import PatchSpec
from qresafe.stages import patch_state
from qresafe.stages.patch_data import Pool, collate, full_row
from qresafe.stages.patch_loop import PatchInputs, PatchLoop, learning_rate, train_patch
from qresafe.stages.patch_loss import answer_logps
from qresafe.stages.patch_output import read_tensors
from qresafe.stages.train_engine import LocalEngine

FILES = ("adapter.safetensors", "masks.safetensors", "codes.safetensors", "delta.safetensors")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The last bits of a matrix product depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(spec: PatchSpec, folder: Path | UPath) -> dict[str, bytes]:
    train_patch(LocalEngine(), patch_inputs(spec), spec, UPath(folder), Silent())
    return {name: (UPath(folder) / name).read_bytes() for name in FILES}


class Cut(Exception):
    """Stands for the death of the process."""


class CutEngine(LocalEngine):
    """Dies before optimizer step `after`."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def step(self, lr: float) -> float:
        if not self.left:
            raise Cut
        self.left -= 1
        return super().step(lr)


def cut_short(spec: PatchSpec, folder: Path, after: int) -> None:
    with pytest.raises(Cut):
        train_patch(CutEngine(after), patch_inputs(spec), spec, UPath(folder), Silent())


@pytest.mark.parametrize("on", ["weight", "factors"])
@pytest.mark.parametrize("after", [1, 3, 5, 7])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    on: str, after: int, tmp_path: Path
) -> None:
    """K = 3 and a checkpoint every 3 steps: cuts fall before, at and behind both."""
    mask = {"on": on, "tau": 0.5, "remask_every": 3, "samples": 4}
    spec = patch_spec(mask=mask, through_grid=on == "weight")
    whole = trained(spec, tmp_path / "whole")
    cut_short(spec, tmp_path / "cut", after)
    assert trained(spec, tmp_path / "cut") == whole
    lines = (tmp_path / "cut" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 9))


def test_sigkill_then_resume_gives_the_same_bytes(tmp_path: Path) -> None:
    spec = patch_spec()
    whole = trained(spec, tmp_path / "whole")
    folder = tmp_path / "killed"
    program = (
        "import os, signal, sys, torch; torch.set_num_threads(1)\n"
        "from patching import *; from upath import UPath\n"
        "from qresafe.progress import Silent\n"
        "from qresafe.stages.patch_loop import train_patch\n"
        "from qresafe.stages.train_engine import LocalEngine\n"
        "class Killed(Silent):\n"
        "    steps = 0\n"
        "    def advance(self, done=1, note=''):\n"
        "        self.steps += done\n"
        "        if self.steps == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "spec = patch_spec()\n"
        "train_patch(LocalEngine(), patch_inputs(spec), spec, UPath(sys.argv[1]), Killed())\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    ended = subprocess.run([sys.executable, "-c", program, str(folder)], env=environment)
    assert ended.returncode == -signal.SIGKILL
    assert not (folder / "codes.safetensors").exists()
    assert trained(spec, folder) == whole


def test_truncated_newest_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    spec = patch_spec()
    whole = trained(spec, tmp_path / "whole")
    cut_short(spec, tmp_path / "cut", 7)
    root = tmp_path / "cut" / patch_state.FOLDER
    assert sorted(os.listdir(root)) == ["00000003", "00000006"]
    newest = root / "00000006" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-9])
    found = patch_state.load(UPath(tmp_path / "cut"), torch.device("cpu"))
    assert found is not None
    assert found[1]["step"] == 3
    assert trained(spec, tmp_path / "cut") == whole
    (root / "00000006" / "meta.json").write_text('{"step": 6')
    assert patch_state.load(UPath(tmp_path / "cut"), torch.device("cpu"))[1]["step"] == 8


def test_checkpoints_work_on_remote_storage(tmp_path: Path) -> None:
    spec = patch_spec(steps=7, checkpoint_every=2)
    remote = UPath("memory://bucket/patch")
    assert trained(spec, remote) == trained(spec, tmp_path)
    kept = sorted(place.name for place in (remote / patch_state.FOLDER).iterdir())
    assert kept == ["00000006", "00000007"]


@pytest.mark.parametrize("on", ["weight", "factors"])
def test_nothing_outside_the_mask_moves_between_two_remaskings(on: str) -> None:
    """AdamW with momentum and weight decay over the whole loop, bit for bit."""
    mask = {"on": on, "tau": 0.3, "remask_every": 3, "samples": 4}
    spec = patch_spec(mask=mask, through_grid=False, weight_decay=0.5, steps=10)
    loop = PatchLoop(LocalEngine(), patch_inputs(spec), spec)
    moved = 0
    while loop.step < loop.steps:
        due = loop.step % 3 == 0
        before = None if due else _acting(loop, on)
        loop.advance()
        after = _acting(loop, on)
        for name, layer in loop.layers.items() if before else ():
            for old, new, mask_ in zip(before[name], after[name], _masks(layer, on), strict=True):
                assert torch.equal(old[~mask_], new[~mask_])
                moved += int((old[mask_] != new[mask_]).sum())
    assert moved > 1000
    if on == "weight":
        for layer in loop.layers.values():
            assert torch.all(layer.delta()[~layer.mask] == 0)
            assert torch.equal(layer.codes()[~layer.mask], layer.codes0[~layer.mask])


def _acting(loop: PatchLoop, on: str) -> dict[str, tuple[torch.Tensor, ...]]:
    """Return a copy of what acts in each layer: the change, or A by column and B by row."""
    if on == "weight":
        return {name: (layer.delta(),) for name, layer in loop.layers.items()}
    found = {}
    for name, layer in loop.layers.items():
        A, B = layer._factors()
        found[name] = (A.detach().T.clone(), B.detach().clone())
    return found


def _masks(layer: Any, on: str) -> tuple[torch.Tensor, ...]:
    return (layer.mask,) if on == "weight" else (layer.mask_in, layer.mask_out)


def test_first_dpo_loss_is_ln_2() -> None:
    """References come from Q0's decoded weights by the code that trains: the margin is 0."""
    spec = patch_spec(objective={"dpo": 1.0, "kl": 0.0, "beta": 0.5}, batch_size=6)
    model = tiny_model()
    quantized = quantize_in_place(model)
    table = random_pairs(preferences=6, anchors=0)
    made = PatchLoop(
        LocalEngine(),
        PatchInputs(model, quantized, Pool(table, reference_of(table), spec.objective)),
        spec,
    )
    rows = [full_row(row, frozenset({"dpo"})) for row in table.to_pylist()]
    batch = collate(rows, 0)
    with torch.no_grad():
        logps = answer_logps(made.head.logits(made.model, batch.ids, batch.positions), batch)
    reference = records.REFERENCE_LOGPS.empty_table().from_arrays(
        [
            table["prompt_id"].combine_chunks(),
            logps[:6].double().numpy(),
            logps[6:].double().numpy(),
        ],
        schema=records.REFERENCE_LOGPS,
    )
    fresh = tiny_model()
    quantized = quantize_in_place(fresh)
    pool = Pool(table, reference, spec.objective)
    loop = PatchLoop(LocalEngine(), PatchInputs(fresh, quantized, pool), spec)
    assert loop.advance()["parts"]["dpo"] == pytest.approx(math.log(2), abs=1e-6)
    assert loop.advance()["parts"]["dpo"] < math.log(2) - 1e-3


def test_float16_learns_as_float32_does() -> None:
    """What it rounds away is far less than what the losses change by."""
    found = {}
    for dtype in (torch.float32, torch.float16):
        spec = patch_spec(steps=3)
        inputs = patch_inputs(spec)
        inputs.model.to(dtype)
        loop = PatchLoop(LocalEngine(), inputs, spec)
        found[dtype] = [loop.advance() for _ in range(3)]
    for exact, rounded in zip(*found.values(), strict=True):
        assert rounded["loss"] == pytest.approx(exact["loss"], rel=0.02)
        assert rounded["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.1)


def test_training_lowers_every_term() -> None:
    mask = {"tau": 0.8, "remask_every": 3, "samples": 4}
    spec = patch_spec(
        steps=40, rank=8, lr=2e-2, mask=mask, batch_size=14, micro_batch_size=14, weight_decay=0.0
    )
    loop = PatchLoop(LocalEngine(), patch_inputs(spec), spec)
    records_ = [loop.advance() for _ in range(40)]
    for term in ("dpo", "nll", "kl", "anchor"):
        assert records_[-1]["parts"][term] < 0.8 * records_[0]["parts"][term]
    assert [r["step"] for r in records_ if "mask" in r] == list(range(1, 41, 3))


def test_codes_are_those_of_the_delta_on_q0s_grid(tmp_path: Path) -> None:
    spec = patch_spec()
    trained(spec, tmp_path)
    codes, delta = (read_tensors(UPath(tmp_path / f"{n}.safetensors")) for n in ("codes", "delta"))
    quantized = patch_inputs(spec).quantized
    assert codes.keys() == delta.keys() == quantized.keys()
    changed = 0
    for name, tensor in quantized.items():
        grid, old = tensor.grid, tensor.codes
        # snap by hand: the nearest code of w + delta, clamped to the grid
        step = grid.scale.repeat_interleave(16, 1)
        zero = grid.zero.repeat_interleave(16, 1).float()
        expected = ((tensor.dense() + delta[name]) / step + zero).round().clamp(-8, 7)
        away = (expected - codes[name]).abs()
        assert away.max() <= 1  # a tie may fall to either side
        assert (away > 0).float().mean() < 0.01
        changed += int((codes[name] != old).sum())
    last = json.loads((tmp_path / "history.jsonl").read_text().splitlines()[-1])
    assert last["codes_changed"] == changed / sum(t.codes.numel() for t in quantized.values())


def test_tau_0_moves_nothing_and_random_and_magnitude_masks_have_their_size(tmp_path: Path) -> None:
    trained(patch_spec(mask={"tau": 0.0, "samples": 4}), tmp_path)
    delta = read_tensors(UPath(tmp_path / "delta.safetensors"))
    assert all(torch.all(tensor == 0) for tensor in delta.values())
    for score in ("random", "magnitude"):
        spec = patch_spec(mask={"tau": 0.25, "score": score})
        loop = PatchLoop(LocalEngine(), patch_inputs(spec), spec)
        assert loop.advance()["mask"]["active"] == pytest.approx(0.25, abs=1e-4)


def test_diverging_loss_stops_in_words_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    spec = patch_spec(steps=8, checkpoint_every=2)

    class Poisoned(LocalEngine):
        def step(self, lr: float) -> float:
            norm = super().step(lr)
            self.done = getattr(self, "done", 0) + 1
            if self.done == 5:
                next(iter(self._factors.values())).data.fill_(math.nan)
            return norm

    with pytest.raises(UserError, match=r"the loss is nan at step 6: lower patch\.lr"):
        train_patch(Poisoned(), patch_inputs(spec), spec, UPath(tmp_path), Silent())
    tensors, meta = patch_state.load(UPath(tmp_path), torch.device("cpu"))
    assert meta["step"] == 4
    assert all(torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point())


def test_learning_rate_rises_linearly_and_stays() -> None:
    spec = patch_spec(lr=1.0, warmup_steps=4)
    assert [learning_rate(step, spec) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
