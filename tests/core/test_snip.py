"""SNIP against brute force in float64: one sample at a time, with plain autograd."""

import copy

import pytest
import torch
from torch import nn

from qresafe.core import snip
from qresafe.core.grids import QuantizedTensor, fit_uniform
from qresafe.core.masked_lora import attach
from qresafe.core.snip import SnipScorer
from qresafe.errors import ModelError, ResourceError


class Toy(nn.Module):
    """Two linear layers behind an embedding, and a third that shares the second's input."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 9)
        self.down = nn.Linear(9, 6, bias=False)
        self.head = nn.Linear(6, 11, bias=False)

    def forward(self, ids):
        hidden = self.embed(ids)
        return self.head(hidden + self.down(torch.tanh(self.up(hidden))))


NAMES = ("up", "down", "head")


@pytest.fixture
def toy():
    torch.manual_seed(0)
    return Toy().double()


@pytest.fixture
def ids():
    return torch.randint(0, 11, (5, 7), generator=torch.Generator().manual_seed(2))


def _sample_losses(model, ids):
    """-log p(y|x) of every sample, (samples,)."""
    logits = model(ids[:, :-1])
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return losses.sum(1)


def _brute_force(model, ids):
    """Eq. 3 to the letter: |W * dL(x)/dW| for one x after the other, summed."""
    totals = dict.fromkeys(NAMES, 0.0)
    for sample in ids:
        model.zero_grad()
        _sample_losses(model, sample[None]).sum().backward()
        for name in NAMES:
            weight = model.get_submodule(name).weight
            totals[name] = totals[name] + (weight * weight.grad).abs().detach()
    model.zero_grad()
    return totals


class Joined(Toy):
    """Its second layer gets all tokens in one row, its head some of them, as AnswerHead asks."""

    def __init__(self, positions):
        super().__init__()
        self.positions = positions

    def forward(self, ids):
        hidden = self.embed(ids)
        flat = torch.tanh(self.up(hidden)).flatten(0, 1)
        mixed = hidden + self.down(flat).unflatten(0, hidden.shape[:2])
        return self.head(mixed.flatten(0, 1)[self.positions][None])


@pytest.mark.parametrize("together", [1, 2])
def test_tokens_in_one_row_are_told_apart(ids, together):
    """Two, one, no, and three positions of four rows; with pairs, rows 0 and 2 make a sample."""
    torch.manual_seed(0)
    owners = torch.tensor([0, 0, 1, 3, 3, 3])
    columns = torch.tensor([1, 4, 2, 0, 3, 5])
    rows = ids[:4, :-1]
    model = Joined(owners * 6 + columns).double()
    targets = ids[owners, columns + 1]

    def losses():
        logits = model(rows)[0]
        return nn.functional.cross_entropy(logits, targets, reduction="none")

    expected = dict.fromkeys(NAMES, 0.0)
    for sample in range(4 // together):
        mine = torch.isin(owners, torch.arange(sample, 4, 4 // together))
        model.zero_grad()
        (losses() * mine).sum().backward()
        for name in NAMES:
            weight = model.get_submodule(name).weight
            expected[name] = expected[name] + (weight * weight.grad).abs().detach()
    layers = {name: model.get_submodule(name) for name in NAMES}
    with SnipScorer(layers, rows_per_sample=together) as scorer:
        scorer.batch(4, owners)
        losses().sum().backward()
    found = scorer.scores()
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name])


def _pair_losses(model, ids):
    """A DPO-like loss of pairs: row s is compared with row s + pairs, (pairs,)."""
    chosen, rejected = _sample_losses(model, ids).chunk(2)
    return -nn.functional.logsigmoid(rejected - chosen)


def _layers(model):
    return {name: model.get_submodule(name) for name in NAMES}


@pytest.mark.parametrize("keep_bytes", [0, 1 << 30])  # in files, in memory
@pytest.mark.parametrize("block", [1 << 18, 8])  # whole layers, blocks of one row
@pytest.mark.parametrize("batches", [(5,), (2, 2, 1)])
def test_scores_equal_brute_force(toy, ids, monkeypatch, keep_bytes, block, batches):
    monkeypatch.setattr("qresafe.core.blocks.CPU_BLOCK", block)
    expected = _brute_force(toy, ids)
    scorer = SnipScorer(_layers(toy), keep_bytes=keep_bytes)
    with scorer:
        for batch in ids.split(batches):
            _sample_losses(toy, batch).sum().backward()
    scores = scorer.scores()
    assert list(scores) == list(NAMES)
    for name in NAMES:
        assert scores[name].dtype == torch.float64
        torch.testing.assert_close(scores[name], expected[name], rtol=1e-12, atol=1e-14)


def test_the_absolute_value_is_per_sample_not_per_batch(toy, ids):
    # |a| + |b| >= |a + b|, strictly where two samples disagree.
    expected = _brute_force(toy, ids)["up"]
    toy.zero_grad()
    _sample_losses(toy, ids).sum().backward()
    batch = (toy.up.weight * toy.up.weight.grad).abs()
    assert (batch <= expected + 1e-12).all()
    assert (batch < 0.9 * expected).float().mean() > 0.3


def test_works_on_an_entirely_frozen_model_and_leaves_no_gradients(toy, ids):
    expected = _brute_force(toy, ids)
    toy.requires_grad_(False)
    toy.zero_grad(set_to_none=True)
    with SnipScorer(_layers(toy)) as scorer:
        _sample_losses(toy, ids).sum().backward()
    torch.testing.assert_close(scorer.scores()["up"], expected["up"])
    assert all(p.grad is None and not p.requires_grad for p in toy.parameters())


def test_restores_requires_grad_and_hooks_even_after_an_error(toy, ids):
    scorer = SnipScorer(_layers(toy))
    with scorer:
        assert not toy.up.weight.requires_grad
    assert toy.up.weight.requires_grad
    with pytest.raises(IndexError), scorer:
        toy(ids + 1000)  # no such token
    assert all(p.requires_grad for p in toy.parameters())
    assert not toy.up._forward_hooks


def test_forward_passes_without_gradients_count_nothing(toy, ids):
    with SnipScorer(_layers(toy)) as scorer, torch.no_grad():
        toy(ids)
    assert not scorer.scores()["up"].any()


@pytest.mark.parametrize("on", ["weight", "factors"])
@pytest.mark.parametrize("through_grid", [True, False])
def test_scores_of_patched_layers_are_those_of_their_effective_weights(toy, ids, on, through_grid):
    toy = toy.float()
    quantized = {}
    for name in NAMES:
        weight = toy.get_submodule(name).weight.data
        grid = fit_uniform(weight, 4, -1, False)
        quantized[name] = QuantizedTensor(grid, grid.encode(weight))
    dense = copy.deepcopy(toy)
    layers = attach(toy, quantized, rank=2, alpha=4, on=on, through_grid=through_grid, seed=0)
    for name, layer in layers.items():
        nn.init.normal_(layer.B, std=0.3)
        dense.get_submodule(name).weight.data = layer.effective_weight().detach()
    expected = _brute_force(dense, ids)
    with SnipScorer(layers) as scorer:
        _sample_losses(toy, ids).sum().backward()
    for name in NAMES:
        torch.testing.assert_close(scorer.scores()[name], expected[name], rtol=1e-4, atol=1e-6)
        assert layers[name].A.grad is None
        assert layers[name].A.requires_grad


def test_workers_add_up_layer_by_layer(toy, ids):
    expected = _brute_force(toy, ids)
    halves = []
    for batch in ids.split([3, 2]):  # two workers with unequal shares
        with SnipScorer(_layers(toy), keep_bytes=0) as scorer:
            _sample_losses(toy, batch).sum().backward()
        halves.append(scorer.scores())
    first, second = halves
    for name in first:
        first[name] = first[name] + second[name]  # stands for all_reduce
    for name in first:
        torch.testing.assert_close(first[name], expected[name])


def test_two_dimensional_inputs_are_one_sample_per_row():
    torch.manual_seed(1)
    layer = nn.Linear(4, 3).double()
    inputs = torch.randn(6, 4, dtype=torch.float64)
    with SnipScorer({"layer": layer}) as scorer:
        layer(inputs).pow(2).sum().backward()
    # dL/dy = 2 y, so |W * dL(x)/dW| = |W| * 2 |y_i x_j|.
    outputs = layer(inputs).detach()
    expected = layer.weight.abs() * 2 * (outputs.abs().T @ inputs.abs())
    torch.testing.assert_close(scorer.scores()["layer"], expected.detach())


def test_files_are_gone_at_once_and_a_full_disk_is_a_sentence(tmp_path, toy, monkeypatch):
    scorer = SnipScorer(_layers(toy), folder=tmp_path, keep_bytes=0)
    assert list(tmp_path.iterdir()) == []  # unlinked, so a kill leaves nothing behind
    assert scorer.scores()["up"].shape == (9, 6)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snip.os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match="no space for SNIP scores"):
        SnipScorer(_layers(toy), folder=tmp_path, keep_bytes=0)


def test_a_layer_without_a_matrix_is_refused():
    with pytest.raises(ModelError, match="LayerNorm has no matrix weight"):
        SnipScorer({"norm": nn.LayerNorm(3)})


def test_a_loss_of_two_rows_is_one_sample(toy, ids):
    """|g_w + g_l| per pair, not |g_w| + |g_l|: the sample of Eq. 3 is what has a loss."""
    pairs = torch.cat([ids[:2], ids[2:4]])  # (0, 2) and (1, 3)
    with SnipScorer(_layers(toy), rows_per_sample=2) as scorer:
        _pair_losses(toy, pairs).sum().backward()
    expected = dict.fromkeys(NAMES, 0.0)
    for first, second in ((0, 2), (1, 3)):
        toy.zero_grad()
        _pair_losses(toy, ids[[first, second]]).sum().backward()
        for name in NAMES:
            weight = toy.get_submodule(name).weight
            expected[name] = expected[name] + (weight * weight.grad).abs().detach()
    for name, scores in scorer.scores().items():
        torch.testing.assert_close(scores, expected[name])
