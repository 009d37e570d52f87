"""Trained scales: whose weights are whose, gradients, and what the export writes."""

import math

import pytest
import torch
from torch import nn

from qresafe.core.fp8 import Fp8Grid
from qresafe.core.grids import NF4, QuantizedTensor, UniformGrid, fit_codebook, fit_uniform
from qresafe.core.masked_lora import (
    FactorMaskedLinear,
    WeightMaskedLinear,
    attach,
    attach_frozen,
)
from qresafe.core.overlaid import AdaptedGrid
from qresafe.core.patched import FrozenLinear
from qresafe.core.permuted import PermutedGrid
from qresafe.core.scales import rescaled, scale_of, sum_by_scale, with_scale
from qresafe.errors import ModelError

OUT, IN = 10, 14
KINDS = ("groups", "rows", "tensor", "fp8", "fp8 tensor", "nf4", "permuted")


def _weight(out=OUT, inputs=IN, seed=0):
    return torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed))


def _grid(kind, weight, stored=torch.float32):
    weight = weight.to(stored)
    if kind == "nf4":  # 140 weights in blocks of 16: the last has 12
        return fit_codebook(weight, NF4, 16)
    if kind == "permuted":
        order = torch.randperm(IN, generator=torch.Generator().manual_seed(1))
        return PermutedGrid(fit_uniform(weight[:, order], 3, 7, False), order)
    if kind.startswith("fp8"):
        size = 0 if kind == "fp8 tensor" else -1
        largest = weight.abs().amax().view(1, 1) if size == 0 else weight.abs().amax(1)[:, None]
        return Fp8Grid(largest / 448, size, tuple(weight.shape))
    size = {"groups": 4, "rows": -1, "tensor": 0}[kind]  # 14 = 3 groups of 4 and one of 2
    return fit_uniform(weight, 3, size, False)


def _quantized(kind="groups", stored=torch.float32):
    weight = _weight()
    grid = _grid(kind, weight, stored)
    return QuantizedTensor(grid, grid.encode(weight))


@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_over_the_weights_of_each_scale(kind):
    """Weights are linear in their scale: doubling one adds its own weights once more."""
    quantized, upstream = _quantized(kind), _weight(seed=7)
    grid, dense = quantized.grid, quantized.dense()
    sums = sum_by_scale(grid, dense * upstream)
    scale = scale_of(grid)
    assert sums.shape == scale.shape
    for index in range(scale.numel()):
        doubled = scale.clone()
        doubled.view(-1)[index] *= 2
        more = (with_scale(grid, doubled).decode(quantized.codes) - dense) * upstream
        assert sums.view(-1)[index].item() == pytest.approx(more.sum().item(), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scaled_layer_starts_at_q0_and_has_the_gradient_of_its_weights(kind):
    quantized, rate = _quantized(kind), 3.0
    layer = FrozenLinear(quantized, scale_rate=rate, name="l")
    assert torch.equal(layer.effective_weight(), quantized.dense())
    assert torch.equal(scale_of(layer.exported().grid), scale_of(quantized.grid))
    assert layer.trained.keys() == {"log_scale"}
    with torch.no_grad():
        layer.log_scale.normal_(std=0.1)
    upstream = _weight(seed=5)
    (layer.effective_weight() * upstream).sum().backward()
    for index in (0, layer.log_scale.numel() - 1):
        values = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                layer.log_scale.view(-1)[index] += step
                values.append(float((layer.effective_weight() * upstream).sum()))
                layer.log_scale.view(-1)[index] -= step
        slope = (values[0] - values[1]) / 2e-2
        found = layer.log_scale.grad.view(-1)[index].item()
        assert found == pytest.approx(slope, rel=1e-2, abs=1e-3)


def test_a_scale_is_s_times_exp_of_rate_times_t():
    # s = 2, rate 3, t = log(1.5) / 3: 3.0; codes -1 and 1 stand for -3 and 3
    grid = UniformGrid(torch.tensor([[2.0]]), torch.zeros(1, 1, dtype=torch.int8), 4, -1, (1, 2))
    codes = torch.tensor([[-1, 1]], dtype=torch.int8)
    layer = FrozenLinear(QuantizedTensor(grid, codes), scale_rate=3.0)
    with torch.no_grad():
        layer.log_scale.fill_(math.log(1.5) / 3)
    torch.testing.assert_close(layer.effective_weight(), torch.tensor([[-3.0, 3.0]]))
    torch.testing.assert_close(layer.delta(), torch.tensor([[-1.0, 1.0]]))
    assert torch.equal(layer.codes(), codes)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_training_sees_scales_rounded_to_their_type(stored):
    quantized = _quantized(stored=stored)
    layer = FrozenLinear(quantized, scale_rate=1.0, dtype=torch.float32)
    with torch.no_grad():
        layer.log_scale.fill_(0.013)
    exported = layer.exported()
    assert scale_of(exported.grid).dtype == stored
    wanted = (scale_of(quantized.grid).float() * math.exp(0.013)).to(stored)
    torch.testing.assert_close(scale_of(exported.grid), wanted, rtol=0.01, atol=0)
    assert torch.equal(layer.effective_weight(), exported.dense().float())
    layer.effective_weight().sum().backward()
    assert (layer.log_scale.grad != 0).any()  # straight through the rounding


@pytest.mark.parametrize("latent", [True, False])
@pytest.mark.parametrize("cls", [WeightMaskedLinear, FactorMaskedLinear])
@pytest.mark.parametrize("kind", ["groups", "fp8", "nf4", "permuted"])
def test_both_move_codes_on_q0s_grid_and_decode_them_with_the_new_scales(kind, cls, latent):
    quantized, weight = _quantized(kind), _weight()
    options = {"rank": 2, "alpha": 4.0, "scale_rate": 10.0, "name": "l"}
    layer = cls(quantized, latent=weight if latent else None, **options)
    optimizer = torch.optim.AdamW(layer.trained.values(), lr=0.02, weight_decay=0.1)
    inputs = _weight(32, IN, seed=9)
    mask = _weight(seed=3) < 0
    if cls is WeightMaskedLinear:
        layer.set_masks((mask,))
    for _ in range(6):
        optimizer.zero_grad()
        (layer(inputs) - 1.0).pow(2).mean().backward()
        optimizer.step()
    exported = layer.exported()
    assert torch.equal(layer.effective_weight(), exported.dense())  # as the export, to the bit
    assert (scale_of(exported.grid) != scale_of(quantized.grid)).float().mean() > 0.9
    assert (exported.codes != quantized.codes).any()
    if cls is WeightMaskedLinear:
        assert torch.equal(exported.codes[~mask], quantized.codes[~mask])
    # the codes are those that the same factors give without new scales
    with torch.no_grad():
        layer.log_scale.zero_()
    assert torch.equal(layer.codes(), exported.codes)


def test_both_have_the_gradients_of_their_parts():
    """Factors as without scales but for the weight that acts; a scale's by its own weights."""
    layer = WeightMaskedLinear(_quantized(), rank=2, alpha=4.0, scale_rate=1.0, name="l")
    nn.init.normal_(layer.B, std=0.3)
    upstream = _weight(seed=5)
    (layer.effective_weight() * upstream).sum().backward()
    plain = WeightMaskedLinear(_quantized(), rank=2, alpha=4.0, name="l")
    with torch.no_grad():
        plain.B.copy_(layer.B)
    (plain.effective_weight() * upstream).sum().backward()
    torch.testing.assert_close(layer.A.grad, plain.A.grad)
    torch.testing.assert_close(layer.B.grad, plain.B.grad)
    acting = layer.effective_weight().detach()
    torch.testing.assert_close(layer.log_scale.grad, sum_by_scale(layer.grid, acting * upstream))


def test_the_unrounded_change_is_that_of_codes_and_scales():
    quantized = _quantized(stored=torch.bfloat16)
    layer = WeightMaskedLinear(quantized, rank=2, alpha=4.0, scale_rate=1.0, dtype=torch.float32)
    nn.init.normal_(layer.B, std=0.3)
    with torch.no_grad():
        layer.log_scale.normal_(std=0.1)
    wide = quantized.grid.to(dtype=torch.float32)
    scale = scale_of(wide) * layer.log_scale.detach().exp()
    moved = with_scale(wide, scale).decode(quantized.codes) + (layer.B @ layer.A * 2).detach()
    torch.testing.assert_close(layer.delta() + wide.decode(quantized.codes), moved)


def test_grids_without_scales_of_their_own_are_refused():
    quantized = _quantized()
    adapted = AdaptedGrid(quantized.grid, torch.ones(1, IN), torch.ones(OUT, 1), 1.0)
    with pytest.raises(ModelError, match=r"AdaptedGrid .* in layer 'l': set patch\.trains"):
        FrozenLinear(QuantizedTensor(adapted, quantized.codes), scale_rate=1.0, name="l")
    with pytest.raises(ModelError, match="codes times a scale"):
        rescaled(adapted, torch.zeros(1))


@pytest.mark.parametrize("only_scales", [True, False])
def test_attach_freezes_all_but_what_is_trained(only_scales):
    model = nn.Sequential(nn.Linear(IN, OUT), nn.LayerNorm(OUT))
    quantized = {"0": _quantized()}
    model[0].weight.data = quantized["0"].dense()
    before = model(torch.ones(2, IN))
    if only_scales:
        attach_frozen(model, quantized, 2.0)
    else:
        options = {"rank": 2, "alpha": 2.0, "on": "weight", "through_grid": True, "seed": 0}
        attach(model, quantized, scale_rate=2.0, **options)
    assert torch.equal(model(torch.ones(2, IN)), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"0.log_scale"} | (set() if only_scales else {"0.A", "0.B"})
