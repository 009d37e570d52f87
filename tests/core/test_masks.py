"""Masks against sorting everything at once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qresafe.core import masks
from qresafe.core.masks import (
    HistogramQuantile,
    factor_masks,
    magnitude_scores,
    pack_bits,
    pack_rows,
    random_scores,
    top_fraction,
    unpack_bits,
    unpack_rows,
)
from qresafe.errors import ModelError


def _scores(seed, spread=8.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (7, 5), "b": (3, 11), "c": (1, 2)}
    return {
        name: torch.exp(torch.randn(shape, generator=generator) * spread)
        for name, shape in shapes.items()
    }


def _flat(by_name):
    return torch.cat([tensor.flatten() for tensor in by_name.values()])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.floats(0, 1))
def test_global_masks_are_exactly_the_largest(seed, tau):
    scores = _scores(seed)
    kept = _flat(top_fraction(scores, tau))
    values = _flat(scores)
    count = round(tau * len(values))
    assert int(kept.sum()) == count
    if 0 < count < len(values):
        assert values[kept].min() >= values[~kept].max()


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_ends_are_exact(scope):
    scores = _scores(0)
    assert not _flat(top_fraction(scores, 0.0, scope)).any()
    assert _flat(top_fraction(scores, 1.0, scope)).all()


def test_ties_are_cut_at_the_exact_count_and_in_order():
    scores = {"a": torch.tensor([[1.0, 2.0, 1.0]]), "b": torch.ones(2, 2)}
    masks_ = top_fraction(scores, 3 / 7)  # the 2 and the first two of six ones
    assert masks_["a"].tolist() == [[True, True, True]]
    assert not masks_["b"].any()
    all_zero = top_fraction({"a": torch.zeros(2, 5)}, 0.3)
    assert all_zero["a"].flatten().tolist() == [True] * 3 + [False] * 7


def test_layer_scope_keeps_the_fraction_in_every_layer():
    scores = {"small": torch.rand(10, 10) * 1e-6, "large": torch.rand(20, 10)}
    by_layer = top_fraction(scores, 0.3, "layer")
    assert {name: int(mask.sum()) for name, mask in by_layer.items()} == {"small": 30, "large": 60}
    everywhere = top_fraction(scores, 0.3, "global")
    assert {name: int(m.sum()) for name, m in everywhere.items()} == {"small": 0, "large": 90}


@pytest.mark.parametrize("rank", [1, 2, 500, 1500, 1999, 2000])
def test_histogram_quantile_is_the_kth_largest(rank, monkeypatch):
    monkeypatch.setattr(masks, "_CHUNK", 300)  # several chunks a tensor
    values = torch.cat([torch.rand(1000), 1 + 1e-6 * torch.rand(998), torch.tensor([0.0, 3e38])])
    quantile = HistogramQuantile(rank)
    for part in values.split(700):
        quantile.add(part)
    with pytest.raises(RuntimeError, match="second pass"):
        quantile.threshold()
    quantile.refine()
    for part in values.split(700):
        quantile.add(part)
    expected = values.sort(descending=True).values[rank - 1]
    threshold, ties = quantile.threshold()
    assert threshold == expected.item()
    # Among the top k, the scores equal to the threshold are those not above it.
    assert ties == rank - int((values > expected).sum())


def test_scores_are_read_one_layer_at_a_time():
    alive = []

    class Watched(dict):
        def __getitem__(self, name):
            alive.append(name)
            return super().__getitem__(name)

    top_fraction(Watched(_scores(1)), 0.5)
    assert alive == list("abc") * 4  # sizes and check, two histogram passes, masks


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_scores_that_overflowed_are_a_sentence(bad):
    with pytest.raises(ModelError, match="layer 'a'"):
        top_fraction({"a": torch.tensor([[1.0, bad]])}, 0.5)


def test_factor_masks_keep_the_heaviest_columns_and_rows():
    scores = torch.tensor([[9.0, 0.0, 1.0, 0.0], [0.0, 3.0, 1.0, 0.0]])
    columns, rows = factor_masks(scores, 0.5)
    assert columns.tolist() == [True, True, False, False]  # column sums 9, 3, 2, 0
    assert rows.tolist() == [True, False]  # row sums 10, 4


def test_random_scores_depend_on_seed_and_name_alone():
    shapes = {"x": torch.Size((4, 4)), "y": torch.Size((4, 4))}
    first, second = random_scores(shapes, 0), random_scores({"y": shapes["y"]}, 0)
    assert torch.equal(first["y"], second["y"])
    assert not torch.equal(first["x"], first["y"])
    assert not torch.equal(first["x"], random_scores(shapes, 1)["x"])
    assert torch.equal(first["x"], first["x"])


def test_magnitude_scores_are_absolute_weights():
    weight = torch.tensor([[1.0, -2.0]])
    assert magnitude_scores({"a": lambda: weight})["a"].tolist() == [[1.0, 2.0]]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 17), st.integers(0, 999))
def test_bits_round_trip(rows, columns, seed):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-rows * columns // 8)
    assert torch.equal(unpack_bits(packed, (rows, columns)), mask)
    assert int(packed[0]) & 1 == int(np.asarray(mask).flat[0])


@pytest.mark.parametrize("columns", [1, 7, 8, 13, 64])
def test_packed_rows_are_bits_that_blocks_of_rows_unpack(columns: int) -> None:
    mask = torch.rand(5, columns, generator=torch.Generator().manual_seed(columns)) < 0.5
    packed = pack_rows(mask)
    assert packed.shape == (5, -(-columns // 8))
    for row in range(5):  # numpy's own packing, row by row
        assert packed[row].tolist() == pack_bits(mask[row]).tolist()
    assert torch.equal(unpack_rows(packed[1:3], columns), mask[1:3])
