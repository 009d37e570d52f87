"""The quantize stage: what its key holds, and what its manifest counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qresafe.artifacts import Run
from qresafe.errors import DataError, SpecError
from qresafe.hf.models import ModelRef, resolve
from qresafe.hf.warm import ModelInput
from qresafe.quantize_specs import (
    CalibrationSpec,
    Critical16Spec,
    Fp8Spec,
    GptqSpec,
    LlmQatSpec,
    RtnSpec,
    SafetySpec,
)
from qresafe.specs import ModelSpec
from qresafe.stages.quantize import _calibration, _key_spec, check_ready, quantize


def test_what_nobody_asked_for_is_not_in_the_key() -> None:
    assert "epochs" not in _key_spec(LlmQatSpec())
    assert _key_spec(LlmQatSpec(epochs=2))["epochs"] == 2
    assert "safety" not in _key_spec(LlmQatSpec())
    assert _key_spec(LlmQatSpec(safety=SafetySpec()))["safety"]["dpo"] == 1
    assert "keep_latent" not in _key_spec(LlmQatSpec())
    assert _key_spec(LlmQatSpec(keep_latent=True))["keep_latent"] is True
    nested = Critical16Spec(base=LlmQatSpec())
    assert not {"epochs", "keep_latent"} & _key_spec(nested)["base"].keys()


def test_what_a_nested_method_learns_from_is_an_input(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    base = LlmQatSpec(calibration=CalibrationSpec(path=str(path)))
    found = []
    for word in ("red", "blue"):
        turns = [{"role": "user", "content": "say"}, {"role": "assistant", "content": word}]
        path.write_text(json.dumps({"messages": turns}) + "\n")
        found.append(_calibration(Critical16Spec(base=base)))
    assert found[0]["base calibration"] != found[1]["base calibration"]
    assert found[0]["prompts"] == found[1]["prompts"]


@pytest.mark.parametrize(
    ("none", "remedy"),
    [
        (CalibrationSpec(benign=0, harmful=0), "raise benign, or harmful at risk III"),
        (CalibrationSpec(risk="I", benign=0), "raise benign"),
        (CalibrationSpec(risk="II", obedient=0), "raise obedient"),
    ],
)
def test_an_empty_calibration_set_is_said(none: CalibrationSpec, remedy: str) -> None:
    says = f"no calibration chats in quantize.calibration: {remedy}"
    learns, static = LlmQatSpec(calibration=none), Fp8Spec(activations="static", calibration=none)
    for spec in (GptqSpec(calibration=none), learns, static, Critical16Spec(base=learns)):
        with pytest.raises(DataError, match=says):
            _calibration(spec)
    assert _calibration(Fp8Spec(activations="dynamic", calibration=none)) == {}


def test_a_judge_that_is_not_there_is_said_before_any_work() -> None:
    nowhere = ModelInput(ModelRef("/nowhere", "w"), "key")
    with pytest.raises(SpecError, match="unknown judge 'keywrd': did you mean keyword"):
        check_ready(Critical16Spec(judge="keywrd"), nowhere)


def test_the_manifest_counts_bits_per_weight(tiny_llama: Path, tmp_path: Path) -> None:
    source = ModelInput.of(resolve(ModelSpec(path=str(tiny_llama))))
    made = quantize(Run(str(tmp_path), "t"), source, RtnSpec(bits=4, group_size=32))
    # 4 bits, a float32 scale and a 4-bit zero point per 32, a shape of 128 bits in 14 layers
    assert made.manifest.counts["bits_per_weight"] == round(5.125 + 14 * 128 / 73728, 4)
