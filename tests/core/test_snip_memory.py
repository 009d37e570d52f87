"""Peak memory of scoring and masking: 3 x the largest layer's gradient + 1 bit per weight."""

import torch

from bench.snip import linear_layers, llama, mixed_batches, snip_peak


def test_peak_memory_above_the_model_is_within_the_bound():
    cpu = torch.device("cpu")
    model = llama(hidden=256, layers=8, vocabulary=64).requires_grad_(False)
    layers = linear_layers(model)
    sizes = [layer.weight.numel() for layer in layers.values()]
    bound = 3 * 4 * max(sizes) + sum(sizes) // 8
    assert 4 * sum(sizes) > 6 * bound  # so that holding all scores would show
    peak = snip_peak(model, layers, mixed_batches(2, 2, 2, 2, 64, cpu), cpu)
    assert 0 < peak <= bound
