"""What ZeRO keeps in host memory changes no bit of a patch, also after a break."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from patching import patch_inputs, patch_spec
from upath import UPath

from qresafe.errors import SpecError
from qresafe.loading import load_spec
from qresafe.progress import Silent
from qresafe.specs import ExperimentSpec, PatchSpec
from qresafe.stages.patch import key_spec
from qresafe.stages.patch_loop import train_patch

FILES = ("adapter.safetensors", "masks.safetensors", "codes.safetensors", "delta.safetensors")
SHARDED = [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "parameters")]


class Cut(Silent):
    """Breaks off after `steps` optimizer steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def advance(self, done: int = 1, note: str = "") -> None:
        self.left -= done
        if not self.left:
            raise InterruptedError


def spec_of(stage: int, offload: str) -> PatchSpec:
    """Return a patch of two micro-batches a step, with checkpoints after steps 3 and 6.

    Gradients are clipped, but not under ZeRO-3: there DeepSpeed adds up the norm of what is
    off-loaded in float32, else in float64, and a last bit of the norm moves those of the factors.
    """
    norm = {"max_grad_norm": 1e6} if stage == 3 else {}
    size = {"micro_batch_size": 2, "batch_size": 8, "steps": 6}
    return patch_spec(zero_stage=stage, offload=offload, through_grid=False, **size, **norm)


def one_rank(rank: int, stage: int, offload: str, folder: str) -> None:
    """Run, as one of two gloo processes, with and without off-load, whole and broken off."""
    from qresafe.dist.train_engines import make_engine

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )

    def train(offload: str, name: str, progress: Any) -> None:
        spec = spec_of(stage, offload)
        engine = make_engine(torch.device("cpu"), stage)
        train_patch(engine, patch_inputs(spec), spec, UPath(folder) / name, progress)

    train("none", "whole", Silent())
    train(offload, "offloaded", Silent())
    try:
        train(offload, "cut", Cut(5))
    except InterruptedError:
        train(offload, "cut", Silent())


@pytest.mark.long
@pytest.mark.parametrize(("stage", "offload"), SHARDED)
def test_two_workers_train_the_same_bytes(stage: int, offload: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    given = (stage, offload, str(tmp_path))
    ranks = [context.Process(target=one_rank, args=(rank, *given)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    whole, offloaded, cut = (
        [(tmp_path / name / file).read_bytes() for file in FILES]
        for name in ("whole", "offloaded", "cut")
    )
    assert offloaded == whole
    assert cut == whole


def test_it_is_in_no_key() -> None:
    plain = patch_spec(zero_stage=3)
    assert key_spec(plain) == key_spec(plain.model_copy(update={"offload": "parameters"}))
    assert "offload" not in plain.key_data()


@pytest.mark.parametrize(
    ("patch", "workers", "remedy"),
    [
        ({"offload": "optimizer", "zero_stage": 0}, 1, "set zero_stage to 1, 2 or 3"),
        ({"offload": "parameters", "zero_stage": 2}, 1, "set zero_stage to 3"),
        ({"offload": "optimizer", "method": "flips"}, 1, "set offload to none"),
        ({"offload": "optimizer"}, 0, "set resources.workers to 1"),
    ],
)
def test_what_deepspeed_does_not_offer_is_refused(
    patch: dict[str, Any], workers: int, remedy: str
) -> None:
    with pytest.raises(SpecError, match=remedy):
        load_spec(ExperimentSpec, {"patch": patch, "resources": {"workers": workers}})
