"""The patched layer: Eq. 2, its gradients, and what its masks promise under AdamW."""

import copy

import pytest
import torch
from torch import nn

from qresafe.core.grids import NF4, QuantizedTensor, fit_codebook, fit_uniform, straight_through
from qresafe.core.masked_lora import FactorMaskedLinear, WeightMaskedLinear, attach
from qresafe.core.masks import top_fraction
from qresafe.errors import ModelError

RANK, ALPHA = 3, 6.0  # alpha / rank = 2


def _quantized(kind, out=10, inputs=14, seed=0):
    weight = torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed))
    if kind == "nf4":
        grid = fit_codebook(weight, NF4, 8)
    else:
        grid = fit_uniform(weight, int(kind[-1]), 4, False)  # 14 = 3 groups of 4 and one of 2
    return QuantizedTensor(grid, grid.encode(weight))


def _layer(kind="int4", cls=WeightMaskedLinear, through_grid=True, **options):
    torch.manual_seed(0)
    layer = cls(
        _quantized(kind), rank=RANK, alpha=ALPHA, through_grid=through_grid, name="l", **options
    )
    nn.init.normal_(layer.B, std=0.5)
    return layer


def _mask(shape, seed=3):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4


@pytest.mark.parametrize("block", [1 << 18, 28])  # the whole layer, and blocks of two rows
@pytest.mark.parametrize("through_grid", [True, False])
@pytest.mark.parametrize("kind", ["int2", "int4", "int8", "nf4"])
def test_weight_mask_is_equation_2_with_its_gradients(kind, through_grid, block, monkeypatch):
    monkeypatch.setattr("qresafe.core.blocks.CPU_BLOCK", block)
    layer = _layer(kind, through_grid=through_grid)
    mask = _mask((10, 14))
    layer.set_masks((mask,))
    A = layer.A.detach().clone().requires_grad_()
    B = layer.B.detach().clone().requires_grad_()
    expected = _quantized(kind).dense() + mask * (B @ A) * 2
    if through_grid:
        expected = straight_through(expected, layer.grid)
    upstream = torch.randn(10, 14)
    (expected * upstream).sum().backward()
    (layer.effective_weight() * upstream).sum().backward()
    torch.testing.assert_close(layer.effective_weight(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.A.grad, A.grad)
    torch.testing.assert_close(layer.B.grad, B.grad)
    torch.testing.assert_close(layer.delta(), (mask * (B @ A) * 2).detach())
    if through_grid:  # training sees to the bit what the export writes
        assert torch.equal(layer.effective_weight(), layer.grid.decode(layer.codes()))


@pytest.mark.parametrize("through_grid", [True, False])
def test_factor_masks_in_forward_and_gradients(through_grid):
    layer = _layer("int8", FactorMaskedLinear, through_grid)
    columns, rows = _mask(14), _mask(10, seed=4)
    with torch.no_grad():  # B was changed after construction: let it be the anchor
        layer.set_masks((columns, rows))
    inputs = torch.randn(5, 14)
    A = layer.A.detach().clone().requires_grad_()
    B = layer.B.detach().clone().requires_grad_()
    weight = _quantized("int8").dense() + (B @ A) * 2
    if through_grid:
        weight = straight_through(weight, layer.grid)
    (inputs @ weight.T).pow(2).sum().backward()
    outputs = layer(inputs)
    outputs.pow(2).sum().backward()
    torch.testing.assert_close(outputs, inputs @ weight.T, rtol=1e-4, atol=1e-4)
    # Same gradient inside the masks, none outside.
    torch.testing.assert_close(layer.A.grad, A.grad * columns, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layer.B.grad, B.grad * rows[:, None], rtol=1e-4, atol=1e-3)


def _train(layer, optimizer, steps, target):
    inputs = torch.randn(32, 14, generator=torch.Generator().manual_seed(9))
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(inputs) - target).pow(2).mean().backward()
        optimizer.step()


def _adamw(layer):
    parameters = [p for p in layer.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=0.05, betas=(0.9, 0.99), weight_decay=0.1)


@pytest.mark.parametrize("through_grid", [True, False])
def test_no_weight_outside_the_mask_moves_under_adamw(through_grid):
    layer, base = _layer(through_grid=through_grid), _quantized("int4")
    optimizer = _adamw(layer)
    for round_ in range(3):  # momentum is carried over every re-mask
        mask = _mask((10, 14), seed=round_)
        layer.set_masks((mask,))
        _train(layer, optimizer, 5, target=float(round_))
        assert torch.equal(layer.effective_weight()[~mask], base.dense()[~mask])
        assert torch.equal(layer.codes()[~mask], base.codes[~mask])
        assert not torch.equal(layer.effective_weight()[mask], base.dense()[mask])


@pytest.mark.parametrize("through_grid", [True, False])
def test_no_factor_entry_outside_its_mask_moves_under_adamw(through_grid):
    layer = _layer(cls=FactorMaskedLinear, through_grid=through_grid)
    optimizer = _adamw(layer)
    for round_ in range(4):
        columns, rows = _mask(14, seed=round_), _mask(10, seed=round_ + 50)
        before_A, before_B = (factor.detach().clone() for factor in layer._factors())
        layer.set_masks((columns, rows))
        at_A, at_B = (factor.detach() for factor in layer._factors())
        assert torch.equal(at_A, before_A)  # nothing jumps at the re-mask
        assert torch.equal(at_B, before_B)
        _train(layer, optimizer, 4, target=float(round_))
        after_A, after_B = layer._factors()
        assert torch.equal(after_A[:, ~columns], before_A[:, ~columns])
        assert torch.equal(after_B[~rows], before_B[~rows])
        assert (after_A[:, columns] != before_A[:, columns]).all()
        assert (after_B[rows] != before_B[rows]).all()


def test_masking_gradients_alone_would_not_do():
    # The reason for the anchors: AdamW's momentum and weight decay move a parameter whose
    # gradient is 0, so the promise cannot be kept by masking gradients.
    factor = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([factor], lr=0.1, weight_decay=0.1)
    factor.grad = torch.ones(2)
    optimizer.step()
    before = factor.detach().clone()
    factor.grad = torch.zeros(2)
    optimizer.step()
    assert (factor != before).all()


@pytest.mark.parametrize("cls", [WeightMaskedLinear, FactorMaskedLinear])
def test_state_dict_resumes_bit_for_bit(cls):
    layer = _layer(cls=cls)
    layer.set_masks(tuple(_mask(mask.shape) for mask in layer.masks))
    optimizer = _adamw(layer)
    _train(layer, optimizer, 3, 1.0)
    again, state = _layer(cls=cls), copy.deepcopy(optimizer.state_dict())
    again.load_state_dict(copy.deepcopy(layer.state_dict()))
    optimizer_again = _adamw(again)
    optimizer_again.load_state_dict(state)
    _train(layer, optimizer, 3, 2.0)
    _train(again, optimizer_again, 3, 2.0)
    assert torch.equal(layer.effective_weight(), again.effective_weight())


def test_bfloat16_models_keep_unchanged_codes_and_exact_scales():
    layer = _layer("int8", dtype=torch.bfloat16).to(torch.bfloat16)
    assert layer.grid.scale.dtype == torch.float32  # not rounded by the cast
    layer.set_masks((torch.zeros(10, 14, dtype=torch.bool),))
    assert torch.equal(layer.codes(), _quantized("int8").codes)
    outputs = layer(torch.randn(2, 14, dtype=torch.bfloat16))
    assert outputs.dtype == torch.bfloat16
    outputs.sum().backward()
    assert layer.A.grad.dtype == torch.bfloat16


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(14, 10), nn.Linear(10, 4, bias=False))
        self.norm = nn.LayerNorm(4)

    def forward(self, inputs):
        return self.norm(self.block(inputs))


def _model_and_codes():
    torch.manual_seed(1)
    model, quantized = Model(), {}
    for name in ("block.0", "block.1"):
        weight = model.get_submodule(name).weight
        grid = fit_uniform(weight.data, 4, -1, True)
        quantized[name] = QuantizedTensor(grid, grid.encode(weight.data))
        weight.data = quantized[name].dense()
    return model, quantized


OPTIONS = {"rank": RANK, "alpha": ALPHA, "through_grid": True, "seed": 0}


@pytest.mark.parametrize("on", ["weight", "factors"])
def test_attach_starts_at_q0_and_trains_factors_only(on):
    model, quantized = _model_and_codes()
    inputs = torch.randn(3, 14)
    before = model(inputs)
    layers = attach(model, quantized, on=on, **OPTIONS)
    assert torch.equal(model(inputs), before)  # B = 0
    assert model.block[0] is layers["block.0"]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"block.0.A", "block.0.B", "block.1.A", "block.1.B"}


def test_attach_does_not_depend_on_the_order_of_layers():
    model, quantized = _model_and_codes()
    other = copy.deepcopy(model)
    first = attach(model, quantized, on="weight", **OPTIONS)
    second = attach(other, dict(reversed(quantized.items())), on="weight", **OPTIONS)
    assert all(torch.equal(first[name].A, second[name].A) for name in quantized)
    assert not torch.equal(first["block.0"].A[:, :10], first["block.1"].A)


def test_attach_names_what_is_missing_or_misshapen():
    model, quantized = _model_and_codes()
    with pytest.raises(ModelError, match=r"no linear layer 'block.O'.*did you mean .*block.0"):
        attach(model, {"block.O": quantized["block.0"]}, on="weight", **OPTIONS)
    with pytest.raises(ModelError, match=r"a \(4, 10\) grid for a \(10, 14\) weight"):
        attach(model, {"block.0": quantized["block.1"]}, on="weight", **OPTIONS)
    assert isinstance(model.block[0], nn.Linear)  # nothing was replaced


def test_masks_from_scores_reach_the_layers():
    layer = _layer()
    (mask,) = top_fraction({"l": torch.rand(10, 14)}, 0.25).values()
    layer.set_masks((mask,))
    assert int((layer.delta() != 0).sum()) == round(0.25 * 140)
