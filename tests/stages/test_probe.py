"""A probe sees what an export would be, changes no trained bit, and survives a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from patching import patch_inputs, patch_spec
from upath import UPath

from qresafe.hf.models import load_tokenizer
from qresafe.progress import Silent
from qresafe.records import PROMPT
from qresafe.specs import ChangeSpec, GenerateSpec, PatchSpec
from qresafe.stages import patch_state
from qresafe.stages.patch_loop import PatchLoop, changed, learning_rate, train_patch
from qresafe.stages.patch_output import as_exported
from qresafe.stages.probe import Probe, choose_prompts
from qresafe.stages.train_engine import LocalEngine

FILES = ("adapter.safetensors", "masks.safetensors", "codes.safetensors", "delta.safetensors")


class Noting:
    """A watch that notes a figure of the model's weights, and may end the run."""

    every = 3

    def __init__(self, fatal: int | None = None) -> None:
        self.told: list[tuple[int, float]] = []
        self._fatal = fatal

    def look(self, model: Any) -> dict[str, Any]:
        import torch

        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits
        return {"sum": float(logits.sum())}

    def tell(self, record: Any) -> None:
        self.told.append((record["step"], record["probe"]["sum"]))
        if record["step"] == self._fatal:
            raise SystemExit  # how Tune ends a trial


def run(folder: Path, watch: Noting | None, spec: PatchSpec | None = None) -> dict[str, bytes]:
    spec = spec or patch_spec()
    train_patch(LocalEngine(), patch_inputs(spec), spec, UPath(folder), Silent(), watch)
    return {name: (folder / name).read_bytes() for name in FILES}


def test_looking_changes_no_bit(tmp_path: Path) -> None:
    watch = Noting()
    assert run(tmp_path / "with", watch) == run(tmp_path / "without", None)
    assert [step for step, _ in watch.told] == [3, 6]  # of 8 steps
    lines = (tmp_path / "with" / "history.jsonl").read_text().splitlines()
    probed = {r["step"]: r["probe"]["sum"] for r in map(json.loads, lines) if "probe" in r}
    assert list(probed.items()) == watch.told


def test_a_run_that_was_ended_tells_earlier_looks_again(tmp_path: Path) -> None:
    whole = Noting()
    expected = run(tmp_path / "whole", whole)
    with pytest.raises(SystemExit):
        run(tmp_path / "ended", Noting(fatal=6))
    again = Noting()
    assert run(tmp_path / "ended", again) == expected
    assert again.told == whole.told


@pytest.mark.parametrize("on", ["weight", "factors"])
@pytest.mark.parametrize("through_grid", [True, False])
def test_the_watched_model_is_the_exported_one(on: str, through_grid: bool) -> None:
    import torch

    spec = patch_spec(mask={"on": on, "tau": 0.5, "samples": 4}, through_grid=through_grid)
    loop = PatchLoop(LocalEngine(), patch_inputs(spec), spec)
    for _ in range(4):
        loop.advance()
    x = torch.randn(2, 32)
    for name, layer in loop.layers.items():
        if layer.in_features != 32:
            continue
        expected = x @ layer.grid.decode(layer.codes()).T
        with as_exported(loop.engine, loop.layers):
            torch.testing.assert_close(layer(x), expected)
        outside = layer(x).detach()
        if not through_grid:  # trained without rounding: the export is another model
            assert not torch.equal(outside, expected), name


def test_a_probe_answers_and_judges(tiny_llama: Path) -> None:
    from qresafe.hf.models import load_model

    rows = [{"prompt_id": f"p{i}", "axis": a, "prompt": f"word {i}", "target": "x"}
            for i, a in enumerate(["harmful", "benign"] * 3)]  # fmt: skip
    prompts = pa.Table.from_pylist(rows, schema=PROMPT)
    told: list[Any] = []
    generate = GenerateSpec(max_new_tokens=4)
    probe = Probe(2, prompts, generate, ("keyword", "refusal"), told.append)
    watch = probe.watch(str(tiny_llama))
    found = watch.look(load_model(str(tiny_llama)))
    assert found["shares"]["attack_success"] == 1.0  # a random model holds no refusal string
    assert found["shares"]["exact_match"] == 0.0
    watch.tell({"step": 2, "probe": found})
    assert told == [{"step": 2} | found["shares"]]
    other = Probe(2, prompts.slice(1), generate, ("keyword", "refusal"), told.append)
    history = [{"step": 2, "probe": found}]
    assert probe.curve(history) == told
    assert other.curve(history) == []  # other questions: not comparable
    other.watch(str(tiny_llama)).tell({"step": 2, "probe": found})
    assert len(told) == 1
    assert load_tokenizer(str(tiny_llama))


def test_probe_prompts_are_a_fixed_choice() -> None:
    rows = [{"prompt_id": f"{a}{i}", "axis": a, "prompt": f"{a} {i}"}
            for i in range(40) for a in ("harmful", "benign")]  # fmt: skip
    prompts = pa.Table.from_pylist(rows, schema=PROMPT)
    chosen = choose_prompts(prompts, ["harmful"], 10)
    assert set(chosen["axis"].to_pylist()) == {"harmful"}
    again = choose_prompts(prompts.take(pa.array(range(79, -1, -1))), ["harmful"], 10)
    assert set(chosen["prompt_id"].to_pylist()) == set(again["prompt_id"].to_pylist())
    assert choose_prompts(prompts, ["benign", "harmful"], 99).num_rows == 80


# ---------------------------------------------------------------- changes while training


def test_changes_take_effect_at_their_step() -> None:
    spec = patch_spec(lr=1.0, warmup_steps=2, changes=[{"at": 3, "lr": 0.5, "beta": 2.0},
                                                       {"at": 5, "lr": 0.1}])  # fmt: skip
    rates = [learning_rate(step, spec) for step in range(7)]
    assert rates == [0.5, 1.0, 1.0, 0.5, 0.5, 0.1, 0.1]
    assert [changed(0.7, "beta", step, spec) for step in (2, 3, 6)] == [0.7, 2.0, 2.0]


def test_going_on_from_a_shorter_patch_gives_the_same_bits(tmp_path: Path) -> None:
    """A patch of 8 steps whose rate changes at 4 begins like one of 4 steps."""
    change = ChangeSpec(at=4, lr=1e-3, beta=0.9)
    longer = patch_spec(steps=8, changes=[change.model_dump()])
    expected = run(tmp_path / "whole", None, longer)
    run(tmp_path / "short", None, patch_spec(steps=4))
    patch_state.adopt(UPath(tmp_path / "long"), UPath(tmp_path / "short"))
    assert run(tmp_path / "long", None, longer) == expected
    assert expected != run(tmp_path / "plain", None, patch_spec(steps=8))
    steps = (tmp_path / "long" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == list(range(1, 9))


def test_a_patch_without_changes_keeps_its_key() -> None:
    from qresafe.stages.patch import key_spec

    assert "changes" not in key_spec(patch_spec())
    assert key_spec(patch_spec(changes=[{"at": 1, "lr": 1.0}]))["changes"] == [
        {"at": 1, "lr": 1.0, "beta": None}
    ]
