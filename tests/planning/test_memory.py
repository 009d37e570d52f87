"""The memory model: by hand where that is possible, and against what real stages take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bench import plan_case
from bench.plan_cases import flips_case, generate_case, patch_case, predicted, shape
from qresafe.planning import memory
from qresafe.planning.flipping import flips
from qresafe.planning.memory import Batch, Patching, total
from qresafe.planning.shapes import from_config

TINY = shape(64, 160, 3, 4, 4, 96)
MODEL = from_config(TINY | {"dtype": "bfloat16"}, "tiny")
HOW = Patching(rank=8, group_size=64, device="cpu")
BATCH = Batch(4, 32, 60)


def test_what_lies_there_all_the_time() -> None:
    parts = memory.patch(MODEL, HOW, BATCH, BATCH)
    quantized = 3 * (4 * 64 * 64 + 3 * 160 * 64)
    assert parts["weights"] == 2 * (2 * 96 * 64 + 7 * 64)  # embeddings, head and norms
    assert parts["codes and scales"] == quantized / 2 + (2 + 1) * quantized / 64  # of 4 bits
    assert parts["masks"] == quantized / 8  # a bit for each
    assert parts["rounded weights"] == 2 * quantized  # autograd keeps each layer's
    factors = 3 * 8 * (4 * 128 + 3 * 224)
    assert parts["LoRA factors"] == 4 * factors
    assert parts["optimizer"] == 8 * factors


def test_decoded_weights_are_kept_where_nothing_rounds_them_again() -> None:
    plain = replace(HOW, on="factors", through_grid=False)
    parts, rounded = (memory.patch(MODEL, how, BATCH, BATCH) for how in (plain, HOW))
    assert parts["weights"] - rounded["weights"] == 2 * MODEL.quantized
    assert parts["codes and scales"] == rounded["codes and scales"]


def test_a_latent_start_holds_four_bytes_a_weight_more() -> None:
    latent = replace(HOW, latent=True)
    parts, plain = (memory.patch(MODEL, how, BATCH, BATCH) for how in (latent, HOW))
    assert parts["codes and scales"] - plain["codes and scales"] == 4 * MODEL.quantized


def test_trained_scales_take_16_bytes_each_and_no_mask() -> None:
    scales, factors = MODEL.quantized / 64, MODEL.factors(8)
    parts = {
        trains: memory.patch(MODEL, replace(HOW, trains=trains), BATCH, BATCH)
        for trains in ("scales", "both")
    }
    assert parts["scales"]["LoRA factors"] == 4 * scales
    assert parts["scales"]["optimizer"] == 8 * scales
    assert parts["scales"]["masks"] == 0
    assert parts["both"]["LoRA factors"] == 4 * (scales + factors)
    assert parts["both"]["masks"] == MODEL.quantized / 8  # a bit a weight


def test_flips_hold_a_float64_sum_of_every_weight_and_no_adapter() -> None:
    parts = flips(MODEL, HOW, BATCH)
    assert parts["weights"] == 2 * MODEL.parameters  # decoded
    assert parts["codes and scales"] == (2 + 2 / 64) * MODEL.quantized
    assert parts["gradients"] == 8 * MODEL.quantized + 2 * MODEL.largest  # and one layer's own
    assert not {"LoRA factors", "optimizer", "masks"} & parts.keys()


def test_a_full_baseline_holds_a_gradient_and_two_moments_of_each_weight() -> None:
    full = replace(HOW, on="factors", through_grid=False, snip=False, trains="weights")
    parts = memory.patch(MODEL, full, BATCH, BATCH)
    weights = memory.patch(MODEL, replace(full, trains="codes"), BATCH, BATCH)["weights"]
    assert parts["weights"] == weights  # the trained weights are those that are there anyway
    assert parts["LoRA factors"] == parts["masks"] == 0
    assert parts["optimizer"] == 2 * 4 * MODEL.quantized
    accumulated = memory.patch(MODEL, replace(full, accumulates=True), BATCH, BATCH)
    assert accumulated["gradients"] == 4 * MODEL.quantized


def test_llm_qat_with_8_bit_moments_and_recomputed_blocks() -> None:
    """10 bytes a trained weight instead of 16, and rounded weights of one block at a time."""
    given = {"rounded": True, "teacher": False, "device": "gpu"}
    plain = memory.full_training(MODEL, BATCH, **given)
    assert plain["optimizer"] == 8 * MODEL.quantized
    assert plain["rounded weights"] == 4 * MODEL.quantized
    moments = memory.MOMENTS["adamw8bit"]
    small = memory.full_training(MODEL, BATCH, moments=moments, checkpointing=True, **given)
    assert small["optimizer"] == 2 * (1 + 4 / 256) * MODEL.quantized
    assert small["gradients"] == 4 * MODEL.quantized
    assert small["rounded weights"] <= 4 * MODEL.quantized / MODEL.blocks
    assert small["activations"] < plain["activations"]


def test_zero_stages_divide_what_they_say() -> None:
    factors = 4 * MODEL.factors(8)
    shared = {"world_size": 4, "accumulates": True, "snip": False}
    plans = [
        memory.patch(MODEL, replace(HOW, zero_stage=stage, **shared), BATCH, BATCH)
        for stage in (0, 1, 2, 3)
    ]
    assert [p["optimizer"] / factors for p in plans] == [2, 0.5, 0.5, 0.5]
    assert [p["gradients"] / factors for p in plans] == [1, 1, 0.25, 0.25]
    # the factors themselves, and DeepSpeed's own copy of a quarter
    assert [p["LoRA factors"] / factors for p in plans] == [1, 1.25, 1.25, 0.5]
    other, codes, block = 2 * MODEL.other, MODEL.quantized / 2, MODEL.quantized / 2 / MODEL.blocks
    assert [p["weights"] for p in plans] == [other, other, other, other / 4 + block]
    scales = (2 + 1) * MODEL.quantized / 64
    assert [p["codes and scales"] - scales for p in plans] == [codes, codes, codes, codes / 4]


def test_a_cache_is_two_vectors_per_head_token_and_block() -> None:
    parts = memory.generate(MODEL, Batch(5, 20, 12))
    assert parts["KV cache"] == 2 * 64 * 2 * 5 * 20 * (3 + 1)  # and one layer while it is copied


def test_a_larger_batch_takes_more_and_checkpointing_less() -> None:
    small, large = (
        total(memory.patch(MODEL, HOW, batch, BATCH)) for batch in (BATCH, Batch(64, 32, 960))
    )
    assert large > small
    again = replace(HOW, checkpointing=True)
    assert total(memory.patch(MODEL, again, Batch(64, 32, 960), BATCH)) < large


def test_recomputed_blocks_keep_their_inputs_and_one_weight_set() -> None:
    # 2,048 tokens, but few answers: the peak is in a block's gradient.
    parts = memory.patch(
        MODEL, replace(HOW, checkpointing=True, snip=False), Batch(64, 32, 1), BATCH
    )
    assert parts["rounded weights"] == 2 * MODEL.quantized / 3
    inputs = 3 * 2 * 2048 * 64
    plain = memory.patch(MODEL, replace(HOW, snip=False), Batch(64, 32, 1), BATCH)
    ends = 2048 * 64 * (2 + 4)
    assert parts["activations"] - inputs == (plain["activations"] - ends) / 3


SMALL: dict[str, dict[str, Any]] = {
    "even": shape(256, 704, 3, 4, 4, 2048),
    "wide": shape(512, 1792, 1, 8, 2, 1024),  # grouped key heads
    "words": shape(128, 352, 3, 2, 2, 16000),
    "tall": shape(64, 176, 16, 2, 2, 512),
}
MEASURED = {
    "even, float32": ("even", patch_case("even", rows=2)),
    "wide, bfloat16": ("wide", patch_case("wide", rows=2, dtype="bfloat16")),
    "words, factors": ("words", patch_case("words", rows=2, on="factors", through_grid=False)),
    "tall, recomputed": ("tall", patch_case("tall", answer=128, gradient_checkpointing=True)),
    "words, flips": ("words", flips_case("words", rows=2)),
    "wide, generate": ("wide", generate_case("wide")),
}


QUICK = ("even, float32", "words, factors", "words, flips")
LONG = [pytest.param(name, marks=pytest.mark.long) for name in MEASURED if name not in QUICK]


@pytest.mark.parametrize("name", [*QUICK, *LONG])
def test_a_prediction_is_within_15_percent_of_the_real_stage(name: str, monkeypatch) -> None:
    size, case = MEASURED[name]
    monkeypatch.setattr("bench.plan_cases.SHAPES", SMALL)
    peak = plan_case.peak_of(case | {"shape": SMALL[size]}, "cpu")
    assert total(predicted(case, "cpu")) == pytest.approx(peak, rel=0.15)
