import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qresafe.errors import DataError
from qresafe.hf.batching import left_pad, length_plan, right_pad
from qresafe.hf.finetune import answer_logits, epoch_batches, finetune, warmup_cosine

CHATS = [([3, 4, 5], [6, 1]), ([3, 7], [8, 9, 1]), ([3, 4, 5, 6, 7], [1])]


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def test_padding_sides() -> None:
    ids, mask = left_pad([[5, 6], [7]], pad=0)
    assert ids.tolist() == [[5, 6], [0, 7]]
    assert mask.tolist() == [[1, 1], [0, 1]]
    ids, mask = right_pad([[5, 6], [7]], pad=9)
    assert ids.tolist() == [[5, 6], [7, 9]]
    assert mask.tolist() == [[1, 1], [1, 0]]


def test_length_plan_sorts_by_length_then_index() -> None:
    assert length_plan([3, 1, 3, 2], batch_size=2) == [[1, 3], [0, 2]]
    assert length_plan([], batch_size=2) == []


def test_schedule_by_hand() -> None:
    # step 0 of 10 with 5 warm-up steps: 1/5 * (1 + cos 0) / 2 = 0.2; step 5: 1 * (1 + 0) / 2.
    assert warmup_cosine(0, 10, 5) == pytest.approx(0.2)
    assert warmup_cosine(5, 10, 5) == pytest.approx(0.5)


def test_each_pass_holds_every_row_once() -> None:
    batches = epoch_batches([5, 1, 9, 2, 2], batch_size=2, seed=3)
    first = [next(batches) for _ in range(3)]
    assert sorted(index for batch in first for index in batch) == [0, 1, 2, 3, 4]
    again = epoch_batches([5, 1, 9, 2, 2], batch_size=2, seed=3)
    assert first == [next(again) for _ in range(3)]


def test_answer_logits_equal_unbatched_forward(model: LlamaForCausalLM) -> None:
    logits, targets = answer_logits(model, CHATS)
    rows = []
    for prompt, answer in CHATS:  # one sequence at a time, no padding, the full head
        full = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        rows.append(full[len(prompt) - 1 : -1])
    assert targets.tolist() == [token for _, answer in CHATS for token in answer]
    torch.testing.assert_close(logits, torch.cat(rows), rtol=1e-5, atol=1e-6)


def test_first_loss_is_the_mean_nll_of_answer_tokens(model: LlamaForCausalLM) -> None:
    logits, targets = answer_logits(model, CHATS)
    wanted = -logits.double().log_softmax(-1)[range(6), targets].mean().item()
    history = finetune(model, CHATS, parameters=model.parameters(), steps=1, batch_size=8, lr=0.1)
    assert history == [pytest.approx(wanted, rel=1e-6)]


def test_same_seed_same_bits_and_only_the_given_parameters_move(model: LlamaForCausalLM) -> None:
    start = {name: value.clone() for name, value in model.state_dict().items()}
    moved = model.model.layers[0].mlp.up_proj.weight
    runs = []
    for _ in range(2):
        model.load_state_dict(start)
        finetune(model, CHATS, parameters=[moved], steps=3, batch_size=2, lr=0.01, seed=5)
        runs.append({name: value.clone() for name, value in model.state_dict().items()})
    changed = [name for name in start if not torch.equal(start[name], runs[0][name])]
    assert changed == ["model.layers.0.mlp.up_proj.weight"]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in start)


def test_self_distillation_from_itself_has_the_entropy_as_loss(model: LlamaForCausalLM) -> None:
    logp = answer_logits(model, CHATS)[0].double().log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1).mean().item()
    (loss,) = finetune(
        model,
        CHATS,
        parameters=model.parameters(),
        steps=1,
        batch_size=8,
        lr=1e-3,
        loss="self_distill",
        teacher=model,
    )
    assert math.isclose(loss, entropy, rel_tol=1e-6)


def test_empty_chats_are_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(DataError, match="no chats"):
        finetune(model, [], parameters=model.parameters(), steps=1, batch_size=1, lr=1e-3)
    with pytest.raises(DataError, match="chat 0"):
        finetune(model, [([], [1])], parameters=model.parameters(), steps=1, batch_size=1, lr=1e-3)
