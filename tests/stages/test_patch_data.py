"""Which step sees which rows, and what the tensors say: against plain forward passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patching import patch_spec, random_pairs, reference_of, tiny_model
from pydantic import ValidationError
from torch.nn import functional as F

from qresafe.core.objectives import objective
from qresafe.errors import DataError
from qresafe.hf.answer_head import AnswerHead
from qresafe.specs import MaskSpec, ObjectiveSpec
from qresafe.stages.patch_data import Pool, batch_at, collate, share, total_steps
from qresafe.stages.patch_loss import term_losses

OBJECTIVE = patch_spec().objective


@given(rows=st.integers(1, 30), batch=st.integers(1, 40), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_every_epoch_holds_every_row_once(rows: int, batch: int, seed: int) -> None:
    steps = -(-2 * rows // batch)
    stream = [index for step in range(steps) for index in batch_at(rows, batch, seed, step)]
    assert len(stream) == steps * batch
    assert sorted(stream[:rows]) == sorted(stream[rows : 2 * rows]) == list(range(rows))


@given(
    rows=st.integers(1, 20),
    world=st.integers(1, 4),
    micro=st.integers(1, 8),
    seed=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_shares_partition_the_batch_in_equally_many_pieces(
    rows: int, world: int, micro: int, seed: int
) -> None:
    lengths = np.random.default_rng(seed).integers(1, 50, rows)
    parts = [
        share(range(rows), lengths, rank=rank, world_size=world, micro=micro)
        for rank in range(world)
    ]
    assert sorted(i for part in parts for piece in part for i in piece) == list(range(rows))
    assert len({len(part) for part in parts}) == 1
    assert max(len(piece) for part in parts for piece in part) <= micro


def test_steps_or_epochs() -> None:
    assert total_steps(10, patch_spec(steps=7)) == 7
    # 1.5 epochs of 10 rows are 15 rows: 4 batches of 4
    assert total_steps(10, patch_spec(steps=None, epochs=1.5, batch_size=4)) == 4


def test_pool_keeps_the_rows_that_a_term_uses() -> None:
    pairs = random_pairs(preferences=3, anchors=5)
    only_dpo = Pool(pairs, reference_of(pairs), ObjectiveSpec(dpo=1.0, kl=0.0))
    assert len(only_dpo) == 3
    assert len(Pool(pairs, None, ObjectiveSpec(kl=0.0, anchor=1.0))) == 5
    assert len(Pool(pairs, None, ObjectiveSpec())) == 8
    with pytest.raises(DataError, match="has no reference log-probs"):
        Pool(pairs, reference_of(pairs.slice(1)), ObjectiveSpec(dpo=1.0))
    anchors_only = random_pairs(preferences=0, anchors=4)
    with pytest.raises(DataError, match=r"no pair serves the terms \['dpo'\]"):
        Pool(anchors_only, None, ObjectiveSpec(dpo=1.0, kl=0.0))


def test_mask_rows_are_preferences_else_answers() -> None:
    pairs = random_pairs(preferences=3, anchors=5)
    rows = Pool(pairs, None, ObjectiveSpec()).mask_rows(MaskSpec(samples=2), seed=0)
    wanted = [row["chosen_ids"] for row in pairs.to_pylist() if row["preference"]]
    assert len(rows) == 2
    assert all(row.chosen in wanted for row in rows)
    no_preference = Pool(random_pairs(preferences=0, anchors=5), None, ObjectiveSpec())
    assert len(no_preference.mask_rows(MaskSpec(samples=3), seed=0)) == 3
    with pytest.raises(DataError, match="no pair is a preference"):
        no_preference.mask_rows(MaskSpec(samples=3, loss="dpo"), seed=0)


def test_rows_without_a_second_answer_have_no_dpo_score() -> None:
    with pytest.raises(ValidationError, match="set rows to preferences"):
        MaskSpec(rows="all", loss="dpo")


def test_mask_rows_of_every_kind_and_of_benign_answers() -> None:
    pairs = random_pairs(preferences=3, anchors=5)
    pool = Pool(pairs, None, ObjectiveSpec())
    assert len(pool.mask_rows(MaskSpec(samples=8, rows="all"), seed=0)) == 8
    benign = [row["chosen_ids"] for row in pairs.to_pylist() if row["kind"] == "benign"]
    rows = pool.utility_rows(MaskSpec(samples=64), seed=0)
    assert [row.chosen for row in rows] == benign
    only_pairs = Pool(random_pairs(preferences=3, anchors=0), None, ObjectiveSpec())
    with pytest.raises(DataError, match="no pair is benign"):
        only_pairs.utility_rows(MaskSpec(), seed=0)


def test_kl_rows_are_cut_and_lengths_say_so() -> None:
    pairs = random_pairs(preferences=2, anchors=3)
    pool = Pool(pairs, None, ObjectiveSpec(kl_tokens=2))
    for index, row in enumerate(pool.rows(range(5))):
        assert len(row.chosen) == 2
        assert pool.lengths[index] == len(row.prompt) + 2


def test_terms_equal_one_plain_forward_pass_per_answer() -> None:
    """No padding, no batching, no cut: log-softmax of each answer alone, in float64."""
    pairs = random_pairs(preferences=3, anchors=4, seed=5)
    pool = Pool(pairs, reference_of(pairs), OBJECTIVE)
    model = tiny_model().double()
    batch = collate(pool.rows(range(7)), OBJECTIVE.kl_tokens)
    logits = AnswerHead(model).logits(model, batch.ids, batch.positions)
    found = term_losses(logits, batch, OBJECTIVE.beta)

    def logps(prompt: list[int], answer: list[int]) -> torch.Tensor:
        ids = torch.tensor([prompt + answer])
        return model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)

    dpo, nll, anchor, kl = [], [], [], []
    for row in pairs.to_pylist():
        chosen = logps(row["prompt_ids"], row["chosen_ids"])
        sums = chosen.gather(1, torch.tensor(row["chosen_ids"])[:, None]).sum()
        if row["preference"]:
            rejected = logps(row["prompt_ids"], row["rejected_ids"])
            lost = rejected.gather(1, torch.tensor(row["rejected_ids"])[:, None]).sum()
            dpo.append(-F.logsigmoid(OBJECTIVE.beta * ((sums + 20) - (lost + 22))))
            nll.append(-sums / len(row["chosen_ids"]))
        else:
            anchor.append(-sums / len(row["chosen_ids"]))
        teacher = torch.tensor(row["teacher_logps"]).view(-1, 5).double()[:3]
        ids = torch.tensor(row["teacher_ids"]).view(-1, 5)[:3]
        mine = chosen[: len(ids)].gather(1, ids)
        rest, mine_rest = 1 - teacher.exp().sum(1), 1 - mine.exp().sum(1)
        terms = (teacher.exp() * (teacher - mine)).sum(1) + rest * (rest / mine_rest).log()
        kl.append(terms.mean())
    for name, expected in (("dpo", dpo), ("nll", nll), ("anchor", anchor), ("kl", kl)):
        torch.testing.assert_close(
            found[name].double(), torch.stack(expected), rtol=1e-4, atol=1e-5, msg=name
        )


def test_tokens_are_counted_without_padding() -> None:
    pairs = random_pairs(preferences=1, anchors=2)
    rows = Pool(pairs, reference_of(pairs), ObjectiveSpec(dpo=1.0, kl=0.0)).rows([0])
    prompt, chosen, rejected = (
        len(pairs[name][0]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    # An answer's last token is predicted but not fed.
    assert collate(rows, 0).tokens == 2 * prompt + chosen - 1 + rejected - 1


def test_gradient_does_not_depend_on_the_cut_into_micro_batches() -> None:
    pairs = random_pairs(preferences=4, anchors=5, seed=2)
    pool = Pool(pairs, reference_of(pairs), OBJECTIVE)
    indices = list(range(9))

    def gradient(pieces: list[list[int]]) -> torch.Tensor:
        model = tiny_model().double()
        head, counts = AnswerHead(model), pool.counts(indices)
        for piece in pieces:
            batch = collate(pool.rows(piece), OBJECTIVE.kl_tokens)
            logits = head.logits(model, batch.ids, batch.positions)
            losses = term_losses(logits, batch, OBJECTIVE.beta)
            objective(losses, OBJECTIVE.model_dump(), counts)[0].backward()
        return model.model.layers[0].mlp.up_proj.weight.grad

    whole = gradient([indices])
    pieces = gradient([[8], [0, 5, 7], [1, 2, 3], [4, 6]])
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-6)
