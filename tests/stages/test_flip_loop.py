"""The discrete patch's promises: the loss falls, the budget holds, and a kill changes no code."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from patching import flip_spec, patch_inputs
from upath import UPath

from qresafe.core.flips import best_flips
from qresafe.core.grids import QuantizedTensor
from qresafe.errors import DataError, DivergedError
from qresafe.progress import Silent
from qresafe.specs import PatchSpec
from qresafe.stages.flip_loop import FlipLoop, flip_codes
from qresafe.stages.flip_loss import FlipLoss
from qresafe.stages.patch_output import read_tensors
from qresafe.stages.train_engine import LocalEngine

FILES = ("codes.safetensors", "delta.safetensors")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The last bits of a matrix product depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def patched(spec: PatchSpec, folder: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    flip_codes(LocalEngine(), patch_inputs(spec), spec, UPath(folder), Silent())
    lines = (folder / "history.jsonl").read_text().splitlines()
    files = {name: (folder / name).read_bytes() for name in FILES}
    return files, [json.loads(line) for line in lines]


def test_the_loss_falls_and_the_record_says_what_was_done(tmp_path: Path) -> None:
    spec = flip_spec()
    _, history = patched(spec, tmp_path)
    assert [r["step"] for r in history] == list(range(1, len(history) + 1))
    assert {r["phase"] for r in history} == {"flip", "remove"}
    losses = [r["loss"] for r in history]
    for before, after, record in zip(losses, losses[1:], history[1:], strict=False):
        if not record["kept"]:
            assert after == before
        elif record["phase"] == "flip":
            assert after < before
        else:
            assert after <= before
    # What is told of the result is so: recompute loss and counts from the written codes.
    fresh = patch_inputs(spec)
    codes = read_tensors(UPath(tmp_path / "codes.safetensors"))
    changed = sum(int((codes[n] != q.codes).sum()) for n, q in fresh.quantized.items())
    assert 0 < changed == history[-1]["flips"] <= 60
    loop = FlipLoop(LocalEngine(), fresh, spec)
    at_start = loop._probe_loss()[0]
    for name, layer in loop.layers.items():
        loop.weights[name].data.copy_(layer.grid.decode(codes[name]))
    assert loop._probe_loss()[0] == losses[-1] < at_start
    delta = read_tensors(UPath(tmp_path / "delta.safetensors"))
    for name, layer in fresh.quantized.items():
        assert torch.equal(delta[name], layer.grid.decode(codes[name]) - layer.dense())


def test_single_steps_on_the_ladder_within_a_round(tmp_path: Path) -> None:
    """One round of 10: each code that changed moved to a neighbour, and 10 did."""
    spec = flip_spec(rounds=1, at_once=10, remove=False)
    loop = FlipLoop(LocalEngine(), patch_inputs(spec), spec)
    record = loop.advance()
    assert (record["tried"], record["kept"], record["flips"]) == (10, True, 10)
    moves = [loop.layers[n].codes - loop.start[n].codes for n in loop.layers]
    assert sorted(torch.cat([m.flatten() for m in moves]).abs().tolist())[-11:] == [0] + [1] * 10


def test_the_gradient_is_that_of_the_weighted_means() -> None:
    """Against autograd on a loss written out: kinds' means of each term, weighed."""
    spec = flip_spec()
    inputs = patch_inputs(spec)
    loop = FlipLoop(LocalEngine(), inputs, spec)
    rows = loop.loss.round_rows(3)
    loop._take_gradient(rows)
    pool, kinds = inputs.pool, np_kinds(loop)
    assert len(rows) == 6  # 2 each of harmful, benign and recombined; no pair is borderline
    total = torch.zeros(())
    for kind, weight in (("harmful", 1.0), ("benign", 2.0), ("recombined", 0.5)):
        for term, factor in (("nll", 1.0), ("kl", 0.5), ("anchor", 0.3)):
            mine = [i for i in rows if kinds[i] == kind and pool.eligible[term][i]]
            for index in mine:
                loss = one_row(loop, index, term)
                total = total + weight * factor * loss / len(mine)
    weights = list(loop.weights.values())
    found = torch.autograd.grad(total, weights)
    for name, expected in zip(loop.weights, found, strict=True):
        torch.testing.assert_close(
            loop._gradients.sums[name].float(), expected, rtol=1e-4, atol=1e-6
        )


def np_kinds(loop: FlipLoop) -> list[str]:
    kinds: list[str] = loop.loss.pool.table["kind"].to_pylist()
    return kinds


def one_row(loop: FlipLoop, index: int, term: str) -> torch.Tensor:
    """A row's loss from the model's own logits, in plain torch."""
    row = loop.loss.pool.rows([index])[0]
    ids = torch.tensor([row.prompt + row.chosen])
    start = len(row.prompt) - 1
    logps = loop.model(input_ids=ids).logits[0, start:-1].log_softmax(-1)
    if term != "kl":
        return -logps[torch.arange(len(row.chosen)), torch.tensor(row.chosen)].mean()
    n = min(3, len(row.teacher_ids), len(row.chosen))
    teacher, top = row.teacher_logps[:n], row.teacher_ids[:n]
    inside = logps[:n].gather(1, top)
    known = (teacher.exp() * (teacher - inside)).sum(1)
    rest, student_rest = 1 - teacher.exp().sum(1), 1 - inside.exp().sum(1)
    return (known + rest * (rest / student_rest).log()).mean()


def test_a_round_that_does_not_help_is_taken_back_and_the_next_tries_half() -> None:
    """No loss is below -1, so nothing can help a state that claims it."""
    spec = flip_spec()
    inputs = patch_inputs(spec)
    loop = FlipLoop(LocalEngine(), inputs, spec)
    loop.state = replace(loop.state, round=1, loss=-1.0, means=(0.0, 0.0, 0.0))
    tried = [loop.advance() for _ in range(6)]
    assert [(r["phase"], r["tried"], r["kept"]) for r in tried] == [
        ("flip", 16, False),
        ("flip", 8, False),
        ("flip", 4, False),
        ("flip", 2, False),
        ("flip", 4, False),  # 1 is below `at_least`: other rows, from a quarter of `at_once`
        ("flip", 2, False),
    ]
    assert loop.state.phase == "done"  # two gradients brought nothing, and nothing is to be undone
    for name, layer in inputs.quantized.items():
        assert torch.equal(loop.weights[name], layer.dense())
        assert torch.equal(loop.layers[name].codes, layer.codes)


def test_a_move_that_breaks_the_model_is_taken_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = flip_spec()
    loop = FlipLoop(LocalEngine(), patch_inputs(spec), spec)
    means = loop._probe_loss()[1]
    losses = iter([1.0, math.nan, math.inf, 0.5])
    monkeypatch.setattr(loop, "_probe_loss", lambda: (next(losses), means))
    assert [loop.advance()["kept"] for _ in range(3)] == [False, False, True]
    assert loop.state.loss == 0.5
    broken = FlipLoop(LocalEngine(), patch_inputs(spec), spec)
    monkeypatch.setattr(broken, "_probe_loss", lambda: (math.nan, means))
    with pytest.raises(DivergedError, match="the loss of Q0 is nan"):
        broken.advance()


def test_one_code_at_once_stays_one() -> None:
    """Where `at_once` is 1 a failed round asks other rows; none tries the two of `at_least`."""
    spec = flip_spec(at_once=1, at_least=2, patience=5)
    loop = FlipLoop(LocalEngine(), patch_inputs(spec), spec)
    tried = [loop.advance() for _ in range(6)]
    assert {record["tried"] for record in tried} == {1}
    assert any(record["kept"] for record in tried)


def test_removing_undoes_flips_without_which_the_loss_does_not_rise(tmp_path: Path) -> None:
    whole, history = patched(flip_spec(remove=False), tmp_path / "kept")
    removed, longer = patched(flip_spec(), tmp_path / "removed")
    assert known(longer)[: len(history)] == known(history)
    assert longer[-1]["flips"] <= history[-1]["flips"]
    assert longer[-1]["loss"] <= history[-1]["loss"]
    assert any(r["kept"] for r in longer if r["phase"] == "remove") == (whole != removed)


def known(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what a restart must not change: not the time, nor a gradient that is taken again."""
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens")} for r in history]


@pytest.mark.parametrize("budget", [1, 7, 20])
def test_no_more_codes_change_than_the_budget(budget: int, tmp_path: Path) -> None:
    _, history = patched(flip_spec(max_flips=budget, at_least=1, remove=False), tmp_path)
    assert max(r["flips"] for r in history) == budget


class Killed(Silent):
    """Dies after some rounds, before their checkpoint is written."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, done: int = 1, note: str = "") -> None:
        self.left -= done
        if self.left <= 0:
            raise Cut


class Cut(Exception):
    """Stands for the death of the process."""


@pytest.mark.parametrize("after", [1, 4, 9])
def test_resumed_run_equals_the_uninterrupted_one(after: int, tmp_path: Path) -> None:
    spec = flip_spec()
    whole, history = patched(spec, tmp_path / "whole")
    folder = UPath(tmp_path / "cut")
    with pytest.raises(Cut):
        flip_codes(LocalEngine(), patch_inputs(spec), spec, folder, Killed(after))
    files, resumed = patched(spec, tmp_path / "cut")
    assert files == whole
    assert known(resumed) == known(history)


def one_rank(rank: int, meeting: str, folder: str) -> None:
    """Run as one of two gloo processes."""
    from qresafe.dist.train_engines import ReplicatedEngine

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2
    )
    spec = flip_spec()
    engine = ReplicatedEngine(torch.device("cpu"))
    flip_codes(engine, patch_inputs(spec), spec, UPath(folder), Silent())
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads may end the interpreter's own end with an abort


def test_two_workers_end_with_the_same_codes_as_one(tmp_path: Path) -> None:
    alone, history = patched(flip_spec(), tmp_path / "alone")
    context = multiprocessing.get_context("spawn")
    folder, meeting = str(tmp_path / "two"), str(tmp_path / "meeting")
    (tmp_path / "two").mkdir()
    ranks = [context.Process(target=one_rank, args=(n, meeting, folder)) for n in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    assert {name: (tmp_path / "two" / name).read_bytes() for name in FILES} == alone
    lines = (tmp_path / "two" / "history.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    assert [(r["loss"], r["tokens"]) for r in told] == [(r["loss"], r["tokens"]) for r in history]


def test_pairs_of_no_wanted_kind_say_so() -> None:
    spec = flip_spec(kinds={"harmful": 0, "benign": 0, "borderline": 1, "recombined": 0})
    with pytest.raises(DataError, match="no pair is of a kind with a weight"):
        FlipLoss(patch_inputs(spec).pool, spec.flips, 4, 0)


def test_best_flips_never_point_at_the_code_itself() -> None:
    spec = flip_spec()
    loop = FlipLoop(LocalEngine(), patch_inputs(spec), spec)
    loop._take_gradient(loop.loss.round_rows(0))
    for name, layer in loop.layers.items():
        assert isinstance(layer, QuantizedTensor)
        target, gains = best_flips(layer, loop.ladders[name], loop._gradients.sums[name])
        assert (target != layer.codes)[gains > 0].all()
