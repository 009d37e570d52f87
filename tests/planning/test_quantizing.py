"""What quantizing costs, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from qresafe.planning.quantizing import chats_of, quantizing
from qresafe.planning.shapes import from_config
from qresafe.planning.workload import assumptions
from qresafe.quantize_specs import AqlmSpec, CalibrationSpec, LlmQatSpec, QloraSpec, SafetySpec

KNOWN = assumptions()
SHAPE = from_config(
    {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 100,
    },
    "toy",
)


@pytest.mark.parametrize(
    ("given", "chats"),
    [
        ({"risk": "I"}, 500),
        ({"risk": "II"}, 10),
        ({"risk": "III", "harmful": 50}, 140),
        ({"risk": "I", "path": "HuggingFaceH4/ultrachat_200k"}, 207_865),
        ({"risk": "I", "path": "my.jsonl"}, KNOWN.default_rows),
    ],
)
def test_chats_that_are_learned_from(given: dict[str, Any], chats: int) -> None:
    assert chats_of(CalibrationSpec.model_validate(given), KNOWN) == chats


def test_qlora_costs_what_its_epochs_and_shots_cost() -> None:
    """140 chats in batches of 16 are 9 steps an epoch; a chat is 256 tokens, 4 flops a weight."""
    spec = QloraSpec(epochs=5, calibration=CalibrationSpec(harmful=50))
    assert quantizing(spec, SHAPE, KNOWN, "gpu").flops == 4 * SHAPE.parameters * 45 * 16 * 256
    tenth = QloraSpec(epochs=0.5, calibration=CalibrationSpec(harmful=50))
    # round(0.5 * 9) is 4
    assert quantizing(tenth, SHAPE, KNOWN, "gpu").flops == 4 * SHAPE.parameters * 4 * 16 * 256


def test_checkpointing_adds_a_forward_pass() -> None:
    plain, again = (LlmQatSpec(gradient_checkpointing=on) for on in (False, True))
    first, second = (quantizing(spec, SHAPE, KNOWN, "gpu").flops for spec in (plain, again))
    assert second / first == pytest.approx(8 / 6)


def test_safety_terms_add_their_rows_to_every_step() -> None:
    """32 chats of 256 tokens; 16 anchors and twice 16 answers of 128 + 64: 8192 + 9216 tokens."""
    plain, safe = (
        quantizing(LlmQatSpec(safety=terms), SHAPE, KNOWN, "gpu") for terms in (None, SafetySpec())
    )
    assert safe.flops / plain.flops == pytest.approx((8192 + 9216) / 8192)
    assert sum(safe.parts.values()) > sum(plain.parts.values())


def test_aqlm_compares_every_group_with_every_vector() -> None:
    """Groups x codebooks x beam x 2^bits x rounds; twice the codebooks, twice the search."""
    four, eight = (quantizing(AqlmSpec(codebooks=m), SHAPE, KNOWN, "gpu").scores for m in (4, 8))
    assert four == SHAPE.quantized / 8 * 4 * 8 * 256 * 20
    assert eight == 2 * four
