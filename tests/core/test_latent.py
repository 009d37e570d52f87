"""A start from latent weights: Q0's codes where nothing changes, and smaller moves elsewhere."""

import pytest
import torch
from torch import nn

from qresafe.core.grids import NF4, QuantizedTensor, fit_codebook, fit_uniform
from qresafe.core.latent import latent_offset
from qresafe.core.masked_lora import KINDS, FactorMaskedLinear, WeightMaskedLinear, attach
from qresafe.errors import ModelError

OPTIONS = {"rank": 2, "alpha": 4.0, "name": "l"}  # alpha / rank = 2


def _latent(out=12, inputs=32, seed=0):
    return torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed))


def _rounded(latent, bits=2, stored=torch.float32, symmetric=False):
    grid = fit_uniform(latent.to(stored), bits, 16, symmetric)
    return QuantizedTensor(grid, grid.encode(latent))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_offset_alone_moves_no_code(bits, stored, symmetric):
    latent = _latent(64, 256)
    quantized = _rounded(latent, bits, stored, symmetric)
    offset = latent_offset(quantized, latent)
    assert torch.equal(quantized.grid.move(quantized.codes, offset), quantized.codes)
    wide = quantized.grid.to(dtype=torch.float32)
    step = wide.scale.repeat_interleave(16, 1)
    inside = (wide.decode(quantized.codes) + offset - latent).abs() <= 1e-6 * step
    assert inside.float().mean() > 0.999  # the rest lies on a border, to the last bit


def test_on_a_border_the_code_is_kept_whatever_ties_do():
    # scale 1, zero 0: 0.5 rounds to 0 and 1.5 to 2, ties to even, and codes 0 and 2 come back
    latent = torch.tensor([[0.5, 1.5, 2.5, -0.5]])
    grid = fit_uniform(torch.tensor([[-8.0, 7.0, 0.0, 0.0]]), 4, -1, False)
    assert grid.scale.item() == 1.0
    quantized = QuantizedTensor(grid, grid.encode(latent))
    moved = grid.move(quantized.codes, latent_offset(quantized, latent))
    assert torch.equal(moved, quantized.codes)


def test_codebook_grids_have_cells_too():
    latent = _latent()
    grid = fit_codebook(latent, NF4, 8)
    quantized = QuantizedTensor(grid, grid.encode(latent))
    offset = latent_offset(quantized, latent)
    assert torch.equal(grid.move(quantized.codes, offset), quantized.codes)
    assert (offset != 0).float().mean() > 0.8


def test_latents_of_another_checkpoint_are_refused():
    with pytest.raises(ModelError, match=r"do not round to the checkpoint's codes in the layer"):
        latent_offset(_rounded(_latent()), _latent(seed=1))
    with pytest.raises(ModelError, match="keep_latent=true"):
        latent_offset(_rounded(_latent()), _latent(4, 4))


@pytest.mark.parametrize("through_grid", [True, False])
@pytest.mark.parametrize("cls", [WeightMaskedLinear, FactorMaskedLinear])
def test_the_layer_starts_at_q0_and_snaps_latent_plus_change(cls, through_grid):
    latent = _latent()
    quantized = _rounded(latent)
    layer = cls(quantized, through_grid=through_grid, latent=latent, **OPTIONS)
    assert torch.equal(layer.codes(), quantized.codes)  # B = 0
    started = quantized.dense() if through_grid else latent
    torch.testing.assert_close(layer.effective_weight(), started, rtol=1e-6, atol=0)
    nn.init.normal_(layer.B, std=0.2)
    change = (layer.B @ layer.A * 2).detach()
    if cls is WeightMaskedLinear:
        mask = _latent(seed=5) < 0
        layer.set_masks((mask,))
        change = change * mask
    else:
        layer.set_masks((torch.ones(32, dtype=torch.bool), torch.ones(12, dtype=torch.bool)))
        change = (layer._factors()[1] @ layer._factors()[0] * 2).detach()
    # snap by hand: the code nearest to latent + change, on scales of 16 columns
    step = quantized.grid.scale.repeat_interleave(16, 1)
    zero = quantized.grid.zero.repeat_interleave(16, 1)
    expected = ((latent + change) / step + zero).round().clamp(-2, 1)
    agree = layer.codes() == expected
    assert agree.float().mean() > 0.99  # a tie may fall to either side
    torch.testing.assert_close(layer.delta(), latent + change - quantized.dense())
    formed = layer.effective_weight()
    if through_grid:
        assert torch.equal(formed, quantized.grid.decode(layer.codes()))
    else:
        torch.testing.assert_close(formed, latent + change, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(torch.eye(32)).T, formed)


def test_outside_the_mask_codes_are_q0s_under_adamw():
    latent = _latent()
    quantized = _rounded(latent)
    layer = WeightMaskedLinear(quantized, through_grid=True, latent=latent, **OPTIONS)
    factors = [layer.A, layer.B]
    optimizer = torch.optim.AdamW(factors, lr=0.05, weight_decay=0.1)
    inputs = _latent(64, 32, seed=9)
    for round_ in range(3):  # momentum is carried over every re-mask
        mask = _latent(seed=round_ + 20) < 0
        layer.set_masks((mask,))
        for _ in range(5):
            optimizer.zero_grad()
            (layer(inputs) - float(round_)).pow(2).mean().backward()
            optimizer.step()
        assert torch.equal(layer.codes()[~mask], quantized.codes[~mask])
        assert not torch.equal(layer.codes()[mask], quantized.codes[mask])


def test_a_small_change_moves_codes_from_the_latent_and_none_from_the_grid():
    # 2 bits: half a step is far more than the change; but some latents stand close to a border.
    latent = _latent(64, 64)
    quantized = _rounded(latent)
    change = 0.05 * quantized.grid.scale.min()
    counts = {}
    for start in (None, latent):
        layer = WeightMaskedLinear(quantized, through_grid=True, latent=start, **OPTIONS)
        with torch.no_grad():
            layer.A.fill_(1.0)
            layer.B.fill_(change / 4)  # B A alpha / rank = 2 * 2 * change / 4 = change
        counts[start is None] = int((layer.codes() != quantized.codes).sum())
    assert counts[True] == 0
    assert 0.01 * latent.numel() < counts[False] < 0.1 * latent.numel()  # near 5 % of a cell


def test_a_cast_of_the_model_does_not_round_the_offset():
    latent = _latent()
    quantized = _rounded(latent, bits=8)
    for kind in KINDS.values():
        layer = kind(quantized, through_grid=True, latent=latent, **OPTIONS).to(torch.bfloat16)
        assert layer.offset.dtype == torch.float32
        assert torch.equal(layer.codes(), quantized.codes)


def test_attach_reads_each_layers_latent():
    model = nn.Sequential(nn.Linear(32, 12), nn.Linear(12, 4))
    latents = {"0": _latent(), "1": _latent(4, 12)}
    quantized = {}
    for name, latent in latents.items():
        grid = fit_uniform(latent, 2, -1, False)
        quantized[name] = QuantizedTensor(grid, grid.encode(latent))
        model.get_submodule(name).weight.data = quantized[name].dense()
    options = {"rank": 2, "alpha": 4.0, "through_grid": True, "seed": 0, "on": "weight"}
    inputs = torch.randn(3, 32)
    before = model(inputs)
    layers = attach(model, quantized, latents=latents, **options)
    assert torch.equal(model(inputs), before)
    assert all(layer.offset.abs().max() > 0 for layer in layers.values())
    plain = nn.Sequential(nn.Linear(32, 12), nn.Linear(12, 4))
    with pytest.raises(ModelError, match="layer '1'"):
        attach(plain, quantized, latents=latents | {"1": -latents["1"]}, **options)
