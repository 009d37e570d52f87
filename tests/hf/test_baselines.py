"""TRL and PEFT as oracles of our DPO, and as baselines."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from patching import patch_spec, quantize_in_place, random_pairs, tiny_model

from qresafe.core.masked_lora import attach
from qresafe.errors import DataError
from qresafe.hf import baselines
from qresafe.hf.answer_head import AnswerHead
from qresafe.hf.models import load_tokenizer
from qresafe.stages.patch_data import collate, full_row
from qresafe.stages.patch_loss import answer_logps, term_losses

SPEC = patch_spec(
    objective={"dpo": 1.0, "kl": 0.0, "beta": 0.7}, rank=2, alpha=4.0, through_grid=False, steps=2
)


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(tiny_llama)


def preference_rows() -> list[dict[str, Any]]:
    return random_pairs(preferences=5, anchors=0, seed=3).to_pylist()


def test_dpo_loss_and_gradients_equal_trl_with_a_peft_adapter(
    tokenizer: Any, tmp_path: Path
) -> None:
    """Same weights, same factors, same pairs: TRL's loss and PEFT's gradients are ours."""
    from datasets import Dataset
    from trl import DPOConfig

    rows = preference_rows()
    ours = tiny_model()
    quantized = quantize_in_place(ours)
    theirs = tiny_model()
    quantize_in_place(theirs)
    args = DPOConfig(
        **baselines.trainer_arguments(SPEC, len(rows), tmp_path),
        beta=SPEC.objective.beta,
        max_length=None,
    )
    trainer = baselines.dpo_trainer_class()(
        model=theirs,
        args=args,
        train_dataset=Dataset.from_list(
            [{k: row[k] for k in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in rows]
        ),
        processing_class=tokenizer,
        peft_config=baselines.lora_config(SPEC, list(quantized)),
    )
    head, reference = AnswerHead(ours), {}
    with torch.no_grad():
        batch = collate([full_row(row, frozenset({"dpo"})) for row in rows], 0)
        logps = answer_logps(head.logits(ours, batch.ids, batch.positions), batch).double()
        reference = {"chosen": logps[: len(rows)], "rejected": logps[len(rows) :]}
    layers = attach(ours, quantized, rank=2, alpha=4.0, on="weight", through_grid=False, seed=0)
    adapters = {
        name.removeprefix("base_model.model."): module
        for name, module in trainer.model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert adapters.keys() == layers.keys()
    generator = torch.Generator().manual_seed(0)
    for name, layer in layers.items():
        adapter = adapters[name]
        layer.B.data = torch.randn(layer.B.shape, generator=generator) * 0.1
        adapter.lora_A["default"].weight.data = layer.A.data.clone()
        adapter.lora_B["default"].weight.data = layer.B.data.clone()
    inputs = trainer.data_collator([dict(row) for row in rows])
    expected = trainer.compute_loss(trainer.model, inputs)
    expected.backward()
    with_reference = [
        row | {"chosen_logp": float(c), "rejected_logp": float(r)}
        for row, c, r in zip(rows, reference["chosen"], reference["rejected"], strict=True)
    ]
    batch = collate([full_row(row, frozenset({"dpo"})) for row in with_reference], 0)
    logits = head.logits(ours, batch.ids, batch.positions)
    loss = term_losses(logits, batch, SPEC.objective.beta)["dpo"].mean()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, layer in layers.items():
        for factor, module in ((layer.A, "lora_A"), (layer.B, "lora_B")):
            theirs_grad = getattr(adapters[name], module)["default"].weight.grad
            torch.testing.assert_close(factor.grad, theirs_grad, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("updates", ["lora", "full"])
@pytest.mark.parametrize("method", [baselines.dpo, baselines.sft])
def test_baseline_changes_the_adapted_layers_only(
    method: Any, updates: str, tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_model()
    layers = list(quantize_in_place(model))[:3]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    spec = SPEC.model_copy(update={"updates": updates})
    merged, log = method(model, tokenizer, preference_rows(), spec, layers=layers, work=tmp_path)
    assert len(log) == SPEC.steps
    after = merged.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in layers}


@pytest.mark.parametrize("method", [baselines.dpo, baselines.sft])
def test_a_step_in_parts_is_the_whole_step(method: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Four rows at once, or two and two whose gradients are added: the same losses and weights."""
    found = []
    for micro in (4, 3):  # of four rows, parts of three are not equal: two and two
        model = tiny_model()
        layers = list(quantize_in_place(model))
        spec = SPEC.model_copy(update={"batch_size": 4, "micro_batch_size": micro})
        args = baselines.trainer_arguments(spec, 5, tmp_path)
        assert args["per_device_train_batch_size"] == (4 if micro == 4 else 2)
        found.append(
            method(model, tokenizer, preference_rows(), spec, layers=layers, work=tmp_path)
        )
    (whole, log), (parts, log_of_parts) = found
    assert [e["loss"] for e in log] == pytest.approx([e["loss"] for e in log_of_parts], rel=1e-4)
    assert all(entry["seconds"] > 0 for entry in log)
    start = tiny_model()
    quantize_in_place(start)
    for name, value in whole.state_dict().items():
        moved = (value - start.state_dict()[name]).abs().max()
        assert (value - parts.state_dict()[name]).abs().max() <= 0.02 * moved


def test_several_gpus_are_one(tmp_path: Path) -> None:
    from trl import SFTConfig

    arguments = SFTConfig(**baselines.trainer_arguments(SPEC, 4, tmp_path))
    arguments._n_gpu = 4
    assert baselines.on_one_device(arguments).n_gpu == 1


def test_baseline_without_rows_is_a_data_error(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_model()
    layers = list(quantize_in_place(model))
    with pytest.raises(DataError, match="no row to train the baseline on"):
        baselines.dpo(model, tokenizer, [], SPEC, layers=layers, work=tmp_path)


def test_the_first_step_of_full_dpo_is_adamw_by_hand(tokenizer: Any, tmp_path: Path) -> None:
    """AdamW's first step moves each weight by lr * g / (|g| + eps), against the gradient.

    With the reference equal to the model the loss of each pair is log 2, and dloss/dmargin is
    -beta / 2: the gradient is that of -beta / 2 * mean(log p(y_w) - log p(y_l)).
    """
    spec = SPEC.model_copy(
        update={"method": "dpo", "updates": "full", "steps": 1, "warmup_steps": 0,
                "batch_size": 5, "max_grad_norm": 1e9, "weight_decay": 0.0}
    )  # fmt: skip
    rows = preference_rows()
    by_hand, model = tiny_model(), tiny_model()
    quantize_in_place(by_hand)
    layers = list(quantize_in_place(model))
    batch = collate([full_row(row, frozenset({"dpo"})) for row in rows], 0)
    logits = AnswerHead(by_hand).logits(by_hand, batch.ids, batch.positions)
    logps = answer_logps(logits, batch)
    margin = (logps[: len(rows)] - logps[len(rows) :]).mean()
    (-spec.objective.beta / 2 * margin).backward()
    trained, log = baselines.dpo(model, tokenizer, rows, spec, layers=layers, work=tmp_path)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    for name in layers:
        start = by_hand.get_submodule(name).weight
        step = (trained.get_submodule(name).weight - start).detach()
        gradient = start.grad
        clear = gradient.abs() > 1e-2 * gradient.abs().max()  # not drowned in float32's noise
        expected = -spec.lr * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(step[clear], expected[clear], rtol=1e-2, atol=0)
