"""What cannot go on stops in one sentence, and goes on once the cause is gone."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from upath import UPath

from qresafe.errors import DivergedError, OutOfMemoryError
from qresafe.hf.finetune import finetune
from qresafe.progress import Silent
from qresafe.specs import PatchSpec
from qresafe.stages import patch_state
from qresafe.stages.patch_loop import train_patch
from qresafe.stages.patch_output import read_tensors
from qresafe.stages.search.trial import failure
from qresafe.stages.train_engine import LocalEngine
from tests.patching import patch_inputs, patch_spec, tiny_model

CODES, ADAPTER = "codes.safetensors", "adapter.safetensors"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(spec: PatchSpec, folder: Path, engine: LocalEngine | None = None) -> Path:
    train_patch(engine or LocalEngine(), patch_inputs(spec), spec, UPath(folder), Silent())
    return folder


class SmallEngine(LocalEngine):
    """Has memory for `most(forward pass)` sequences at a time."""

    def __init__(self, most: Callable[[int], int]) -> None:
        super().__init__()
        self.most, self.passes, self.seen = most, 0, list[int]()

    def prepare(self, model: Any, *given: Any) -> Any:
        real = super().prepare(model, *given)

        def forward(*, input_ids: torch.Tensor, **more: Any) -> Any:
            self.passes += 1
            self.seen.append(len(input_ids))
            if len(input_ids) > self.most(self.passes):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return real(input_ids=input_ids, **more)

        return forward


def test_memory_that_runs_out_halves_the_pieces_and_not_the_batch(tmp_path: Path) -> None:
    # Batches of 6 rows in pieces of 6. DPO rows are two sequences, so a piece of 3 rows has 6 at
    # most. From the 3rd pass on there is room for 6: a batch with a preference (of 7 sequences or
    # more) must be halved.
    spec = patch_spec(micro_batch_size=6)
    whole = trained(spec, tmp_path / "whole")
    engine = SmallEngine(lambda passes: 6 if passes > 2 else 99)
    small = trained(spec, tmp_path / "small", engine)
    assert max(engine.seen[:4]) > 6
    late = engine.seen[engine.seen.index(next(n for n in engine.seen[2:] if n > 6), 2) + 1 :]
    assert max(late) <= 6
    expected, found = (read_tensors(UPath(f / ADAPTER)) for f in (whole, small))
    for name, tensor in expected.items():
        # Sums in another order: float32 has 2^-24 = 6e-8 of a value each, over 8 steps.
        assert torch.allclose(found[name], tensor, rtol=1e-3, atol=1e-5), name
    codes = [read_tensors(UPath(f / CODES)) for f in (whole, small)]
    assert all(torch.equal(codes[0][name], codes[1][name]) for name in codes[0])


def test_a_batch_that_does_not_fit_halved_stops_in_words_and_goes_on_later(tmp_path: Path) -> None:
    spec = patch_spec(micro_batch_size=6, checkpoint_every=2)
    whole = trained(spec, tmp_path / "whole")
    engine = SmallEngine(lambda passes: 0 if passes > 5 else 99)  # step 6 finds no room at all
    told = r"out of memory at step 6, 3 rows at a time: lower patch\.micro_batch_size.*are kept"
    with pytest.raises(OutOfMemoryError, match=told) as stopped:
        trained(spec, tmp_path / "small", engine)
    assert failure(stopped.value)[0] == "out of memory"  # of a search's trial
    found = patch_state.load(UPath(tmp_path / "small"), torch.device("cpu"))
    assert found
    assert found[1]["step"] == 4
    small = trained(spec, tmp_path / "small")
    assert (small / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()


def test_other_ranks_that_wait_in_a_pass_are_not_left_alone(tmp_path: Path) -> None:
    engine = SmallEngine(lambda passes: 6)
    engine.independent = False  # as under ZeRO
    with pytest.raises(OutOfMemoryError, match="out of memory at step 1, 6 rows at a time"):
        trained(patch_spec(micro_batch_size=6), tmp_path, engine)


def test_a_fine_tuning_that_diverges_stops_in_words() -> None:
    model, chats = tiny_model(), [([1, 2, 3], [4, 5])] * 4
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(DivergedError, match="the fine-tuning's loss is nan at step 1: lower its"):
        finetune(model, chats, parameters=model.parameters(), steps=3, batch_size=2, lr=1e-3)


# ---------------------------------------------------------------- a disk that is full, or read only

ON_A_DISK = """
import os, subprocess, sys
from pathlib import Path
import torch
from qresafe.artifacts import Run
from qresafe.errors import ResourceError
from qresafe.progress import Silent
from qresafe.stages.patch_loop import train_patch
from qresafe.stages.train_engine import LocalEngine
from tests.patching import patch_inputs, patch_spec

torch.set_num_threads(1)
disk, fault, spec = Path(sys.argv[1]), sys.argv[2], patch_spec(checkpoint_every=2)
full = disk / "full"

class Faulty(LocalEngine):
    steps = 0
    def step(self, lr):
        self.steps += 1
        if self.steps == 6:  # the checkpoint of step 4 is written, that of step 6 is not
            break_disk()
        return super().step(lr)

def break_disk():
    if fault == "readonly":
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        return
    with open(full, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass

def mend_disk():
    if fault == "readonly":
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    full.unlink(missing_ok=True)

def stage(engine):
    def work(folder):
        train_patch(engine, patch_inputs(spec), spec, folder, Silent())
        return {}
    return Run(str(disk), "r").stage("patch", spec={}, inputs={}, code_version=1, work=work)

try:
    stage(Faulty())
except ResourceError as error:
    print(error)
mend_disk()
made = stage(LocalEngine())
print([path for path in disk.rglob("*.tmp-*")])
print(made.manifest.files["adapter.safetensors"])
"""
SAID = {"full": "the disk is full in ", "readonly": "cannot write in "}


@pytest.mark.parametrize("fault", ["full", pytest.param("readonly", marks=pytest.mark.long)])
def test_a_disk_that_fails_during_a_checkpoint(tmp_path: Path, fault: str) -> None:
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*namespace, "true"]).returncode:
        pytest.skip("no user namespaces here, so no disk of our own")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size=4m none "{disk}" && exec "$0" "$@"'
    program = [sys.executable, "-c", ON_A_DISK, str(disk), fault]
    ended = subprocess.run([*namespace, "sh", "-c", mount, *program], capture_output=True,
                           text=True, cwd=Path(__file__).parents[2])  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    sentence, left, digest = ended.stdout.strip().splitlines()
    assert sentence.startswith(SAID[fault])
    assert sentence.count(". ") == 0
    assert left == "[]"
    spec = patch_spec(checkpoint_every=2)
    whole = trained(spec, tmp_path / "whole")
    from qresafe.artifacts import hash_file

    assert hash_file(whole / ADAPTER) == digest
