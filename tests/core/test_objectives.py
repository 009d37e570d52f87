"""The loss terms against arithmetic by hand, TRL, and the full KL divergence."""

import math

import pytest
import torch
from conftest import save_tiny_llama
from torch.nn import functional as F

from qresafe.core.objectives import (
    dpo_loss,
    kl_loss,
    objective,
    sequence_logps,
    token_logps,
)


def test_dpo_by_hand():
    # margin 1: (-1 - -2) - (-3 - -3) = 1; beta 0.5: -log sigmoid(0.5) = log(1 + e^-0.5)
    # margin -4: (-5 - -2) - (-1 - -2) = -4: log(1 + e^2)
    losses = dpo_loss(
        torch.tensor([-1.0, -5.0]),
        torch.tensor([-3.0, -1.0]),
        torch.tensor([-2.0, -2.0]),
        torch.tensor([-3.0, -2.0]),
        beta=0.5,
    )
    expected = [math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(2.0))]
    assert losses.tolist() == pytest.approx(expected)


def test_dpo_starts_at_ln_2_where_q_is_q0():
    chosen, rejected = torch.randn(4), torch.randn(4)
    losses = dpo_loss(chosen, rejected, chosen, rejected, beta=0.01)
    assert losses.tolist() == pytest.approx([math.log(2)] * 4)


def test_token_logps_against_softmax_by_hand():
    logits = torch.tensor([[[0.0, math.log(3.0)], [math.log(4.0), 0.0], [0.0, 0.0]]])
    labels = torch.tensor([[-100, 1, 0]])  # token 1 from position 0, token 0 from position 1
    expected = [math.log(3 / 4), math.log(4 / 5)]
    assert token_logps(logits, labels)[0].tolist() == pytest.approx(expected)
    assert sequence_logps(logits, labels).tolist() == pytest.approx([sum(expected)])
    nothing = torch.tensor([[-100, -100, 0]])
    assert token_logps(logits, nothing)[0].tolist() == pytest.approx([0.0, math.log(4 / 5)])


def _kl(vocabulary, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(2, 3, vocabulary, generator=generator, requires_grad=True)
    teacher = torch.log_softmax(torch.randn(2, 3, vocabulary, generator=generator), -1)
    logps, ids = teacher.topk(k, dim=-1)
    return student, teacher, ids, logps


def test_kl_of_the_whole_vocabulary_is_the_kl_divergence():
    student, teacher, ids, logps = _kl(7, 7)
    expected = F.kl_div(
        torch.log_softmax(student, -1), teacher, reduction="none", log_target=True
    ).sum(-1)
    torch.testing.assert_close(kl_loss(student, ids, logps), expected.mean(1))


def test_kl_of_the_top_k_lumps_the_rest():
    student, teacher, ids, logps = _kl(9, 4)
    q = torch.softmax(student, -1)
    by_hand = torch.zeros(2, 3)
    for row in range(2):
        for token in range(3):
            inside = ids[row, token]
            p_rest = 1 - teacher[row, token, inside].exp().sum()
            q_rest = 1 - q[row, token, inside].sum()
            p = teacher[row, token, inside].exp()
            terms = p * (p / q[row, token, inside]).log()
            by_hand[row, token] = terms.sum() + p_rest * (p_rest / q_rest).log()
    torch.testing.assert_close(kl_loss(student, ids, logps), by_hand.mean(1))
    full = F.kl_div(torch.log_softmax(student, -1), teacher, reduction="none", log_target=True)
    assert (kl_loss(student, ids, logps) <= full.sum(-1).mean(1)).all()
    token_mask = torch.tensor([[True, True, False], [False, False, False]])
    expected = torch.stack([by_hand[0, :2].mean(), torch.tensor(0.0)])
    torch.testing.assert_close(kl_loss(student, ids, logps, token_mask), expected)


def test_kl_is_zero_at_the_teacher_and_finite_when_q_is_certain():
    _, teacher, ids, logps = _kl(9, 4)
    assert kl_loss(teacher, ids, logps).abs().max() < 1e-6
    certain = torch.full((1, 1, 5), -200.0)
    certain[..., 0] = 200.0
    certain.requires_grad_()
    loss = kl_loss(certain, torch.tensor([[[0]]]), torch.tensor([[[math.log(0.9)]]]))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(certain.grad).all()


def test_kl_when_the_teacher_is_certain_has_no_bucket():
    student = torch.tensor([[[0.0, 0.0, 0.0]]])
    loss = kl_loss(student, torch.tensor([[[1]]]), torch.tensor([[[0.0]]]))
    assert loss.tolist() == pytest.approx([math.log(3)])


def test_objective_is_a_weighted_sum_of_means_over_each_terms_rows():
    losses = {"dpo": torch.tensor([1.0, 3.0]), "anchor": torch.tensor([4.0])}
    total, parts = objective(losses, {"dpo": 2.0, "anchor": 0.5}, {"dpo": 2, "anchor": 1})
    assert total.item() == 2.0 * (1 + 3) / 2 + 0.5 * 4.0
    assert parts == {"dpo": 2.0, "anchor": 4.0}


def test_counts_make_micro_batches_add_up_to_the_batch():
    losses = torch.randn(6)
    whole, _ = objective({"kl": losses}, {"kl": 1.0}, {"kl": 6})
    parts = [objective({"kl": part}, {"kl": 1.0}, {"kl": 6})[0] for part in losses.split(2)]
    torch.testing.assert_close(sum(parts), whole)


def test_dpo_loss_and_gradients_equal_trl(tmp_path):
    """TRL's DPOTrainer computes the loss of its own batch; we compute it from the same batch."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [("ab", "no", "yes, sure"), ("c", "never", "ok"), ("defg", "I can't", "step one")]
    names = ("prompt", "chosen", "rejected")
    trainer = DPOTrainer(
        str(save_tiny_llama(tmp_path / "model")),
        args=DPOConfig(
            output_dir=str(tmp_path / "out"),
            beta=0.3,
            per_device_train_batch_size=3,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list([dict(zip(names, row, strict=True)) for row in rows]),
    )
    model = trainer.model.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    with torch.no_grad():
        reference = sequence_logps(model(**inputs).logits, labels)
        for parameter in model.parameters():  # away from Q = Q0
            parameter.add_(0.02 * torch.randn_like(parameter))
    theirs = trainer.compute_loss(trainer.model, dict(batch))
    gradients = torch.autograd.grad(theirs, list(model.parameters()))

    chosen, rejected = sequence_logps(model(**inputs).logits, labels).chunk(2)
    ours = dpo_loss(chosen, rejected, *reference.chunk(2), beta=0.3).mean()
    assert abs(ours.item() - math.log(2)) > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for mine, other in zip(
        torch.autograd.grad(ours, list(model.parameters())), gradients, strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)
