"""What every method refuses of W, from its config alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qresafe.errors import ModelError
from qresafe.hf.models import resolve
from qresafe.hf.warm import ModelInput
from qresafe.quantize_specs import BnbSpec, Critical16Spec, QloraSpec
from qresafe.quantizers.bnb import quantize as quantize_bnb
from qresafe.quantizers.rtn import quantize as quantize_rtn
from qresafe.registry import METHODS
from qresafe.specs import ExperimentSpec, ModelSpec
from qresafe.stages.quantize import check_ready

EACH = sorted(set(METHODS) - {"checkpoint"})


@pytest.fixture
def source(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "w"))


def configure(folder: Path, **more: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | more))


def spec(**settings: Any) -> Any:
    return ExperimentSpec.model_validate({"quantize": settings}).quantize


def check(folder: Path, wanted: Any) -> None:
    check_ready(wanted, ModelInput.of(resolve(ModelSpec(path=str(folder)))))


@pytest.mark.parametrize("method", EACH)
@pytest.mark.parametrize("scheme", ["bitsandbytes", "fp8", "compressed-tensors"])
def test_a_model_that_is_quantized_already_is_refused(
    source: Path, method: str, scheme: str
) -> None:
    configure(source, quantization_config={"quant_method": scheme, "load_in_8bit": True})
    with pytest.raises(ModelError, match=r"^W is quantized already .* of method checkpoint\.$"):
        check(source, spec(method=method))


@pytest.mark.parametrize("method", sorted(set(EACH) - {"bnb", "qlora"}))
def test_a_model_that_sees_is_refused(source: Path, method: str) -> None:
    configure(source, vision_config={"hidden_size": 64})
    with pytest.raises(ModelError, match=r"^not a text-only model in .*gemma-3-1b-it\.$"):
        check(source, spec(method=method))


@pytest.mark.parametrize("method", EACH)
def test_a_model_with_code_of_its_own_is_refused(source: Path, method: str) -> None:
    configure(source, model_type="odd", auto_map={"AutoModelForCausalLM": "modeling_odd.Odd"})
    with pytest.raises(ModelError, match=r"^it runs code of its own.*that transformers has\.$"):
        check(source, spec(method=method))
    # One that transformers knows is loaded by it, whatever lies beside.
    configure(source, model_type="llama")
    check(source, spec(method="rtn", group_size=32))


def test_the_bases_and_the_methods_themselves_refuse_it_too(source: Path, tmp_path: Path) -> None:
    configure(source, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    nested = (QloraSpec(base=BnbSpec(format="int8")), Critical16Spec(base=BnbSpec()))
    for wanted in nested:
        with pytest.raises(ModelError, match="W is quantized already"):
            check(source, wanted)
    for quantize in (quantize_bnb, quantize_rtn):
        with pytest.raises(ModelError, match="W is quantized already"):
            quantize(source, tmp_path / "q", spec(method=quantize.__module__.rpartition(".")[2]))
    assert not (tmp_path / "q").exists()
