"""Patches put on other models: what is added is what they changed, on the target's own grid."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.transfer import moved
from qresafe.hf.checkpoint import QuantizedCheckpoint
from qresafe.quantize_specs import RtnSpec
from qresafe.quantizers.rtn import quantize


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 4/checkpoint and 8/checkpoint, and q: the first with every tenth code moved."""
    folder = tmp_path_factory.mktemp("transfer")
    for bits in (4, 8):
        quantize(tiny_llama, folder / str(bits), RtnSpec(bits=bits, group_size=32))
    q0 = QuantizedCheckpoint.open(folder / "4" / "checkpoint")
    q0.rewrite(folder / "q", {name: nudged(q0.read(name).codes) for name in q0.names})
    return folder


def nudged(codes: torch.Tensor) -> torch.Tensor:
    """Return every tenth code one step further, towards zero so that it stays in range."""
    steps = torch.zeros_like(codes).flatten()
    steps[::10] = 1
    return codes - torch.sign(codes) * steps.reshape(codes.shape)


def test_on_its_own_model_a_patch_is_itself(made: Path) -> None:
    q0, q = QuantizedCheckpoint.open(made / "4/checkpoint"), QuantizedCheckpoint.open(made / "q")
    for name, codes in moved(q0, [(q0, q)]).items():
        assert torch.equal(codes, q.read(name).codes), name


def test_a_patch_and_its_opposite_are_nothing(made: Path) -> None:
    q0, q = QuantizedCheckpoint.open(made / "4/checkpoint"), QuantizedCheckpoint.open(made / "q")
    for name, codes in moved(q0, [(q0, q), (q, q0)]).items():
        assert torch.equal(codes, q0.read(name).codes), name


def test_on_a_finer_grid_the_weights_move_as_far_to_half_a_step(made: Path) -> None:
    q0, q = QuantizedCheckpoint.open(made / "4/checkpoint"), QuantizedCheckpoint.open(made / "q")
    fine = QuantizedCheckpoint.open(made / "8/checkpoint")
    for name, codes in moved(fine, [(q0, q)]).items():
        before = fine.read(name)
        wanted = before.dense() + q.read(name).dense() - q0.read(name).dense()
        found = before.grid.decode(codes)
        low, high = (before.grid.decode(torch.full_like(codes, c)) for c in (-128, 127))
        wanted = torch.minimum(torch.maximum(wanted, low), high)  # no code lies farther out
        step = before.grid.decode(torch.ones_like(codes)) - before.grid.decode(codes * 0)
        assert bool(((found - wanted).abs() <= 0.501 * step).all()), name
        assert not torch.equal(codes, before.codes)
