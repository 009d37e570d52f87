"""Re-masking: the reports, both kinds of mask, and its determinism."""

import pytest
import torch

from qresafe.core.grids import QuantizedTensor, fit_uniform
from qresafe.core.masked_lora import KINDS
from qresafe.core.masks import factor_masks, top_fraction
from qresafe.core.remask import remask


def _layers(on):
    layers = {}
    for name, shape in {"a": (6, 8), "b": (4, 10)}.items():
        grid = fit_uniform(torch.randn(shape), 4, -1, False)
        codes = torch.zeros(shape, dtype=torch.int8)
        layers[name] = KINDS[on](
            QuantizedTensor(grid, codes), rank=2, alpha=2, through_grid=True, name=name
        )
    return layers


def _scores(seed):
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.rand(6, 8, generator=generator), "b": torch.rand(4, 10, generator=generator)}


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_weight_masks_are_the_top_fraction(scope):
    layers, scores = _layers("weight"), _scores(0)
    report = remask(layers, scores, tau=0.25, scope=scope)
    expected = top_fraction(scores, 0.25, scope)
    for name, layer in layers.items():
        assert torch.equal(layer.masks[0], expected[name])
        assert report.active[name] == int(expected[name].sum())
    assert sum(report.active.values()) == 22  # a quarter of 48 + 40
    assert report.total == {"a": 48, "b": 40}
    assert report.overlap == 22 / 88  # before the first mask everything may move


def test_factor_masks_are_per_layer():
    layers, scores = _layers("factors"), _scores(0)
    report = remask(layers, scores, tau=0.5, version=3)
    for name, layer in layers.items():
        for mine, expected in zip(layer.masks, factor_masks(scores[name], 0.5), strict=True):
            assert torch.equal(mine, expected)
    assert report.active == {"a": 3 + 4, "b": 2 + 5}
    assert report.version == 3


@pytest.mark.parametrize("on", ["weight", "factors"])
def test_overlap_with_the_previous_masks(on):
    layers = _layers(on)
    remask(layers, _scores(0), tau=0.5)
    assert remask(layers, _scores(0), tau=0.5).overlap == 1.0
    old = {name: [mask.clone() for mask in layer.masks] for name, layer in layers.items()}
    report = remask(layers, _scores(1), tau=0.5)
    shared = sum(
        int((a & b).sum())
        for name, layer in layers.items()
        for a, b in zip(old[name], layer.masks, strict=True)
    )
    assert report.overlap == shared / sum(report.active.values())
    assert 0 < report.overlap < 1


def test_tau_0_freezes_everything():
    layers = _layers("weight")
    assert remask(layers, _scores(0), tau=0.0).overlap == 0.0
    assert remask(layers, _scores(0), tau=0.0).overlap == 1.0  # both empty
    assert all(not layer.masks[0].any() for layer in layers.values())
