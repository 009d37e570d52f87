"""The spec tree: defaults, overrides, and errors that teach."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from qresafe.errors import SpecError, nearest
from qresafe.loading import load_spec
from qresafe.presets import load_experiment, preset_names
from qresafe.quantize_specs import BnbSpec, CalibrationSpec, LlmQatSpec
from qresafe.specs import ExperimentSpec, GenerateSpec, ObjectiveSpec, PatchSpec
from qresafe.variants import with_changes


def write(folder: Path, text: str) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(text)
    return path


def message(source: object = None, *overrides: str) -> str:
    with pytest.raises(SpecError) as caught:
        load_spec(ExperimentSpec, source, overrides)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith((".", "?"))
    return text


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load_spec(ExperimentSpec, write(tmp_path, "")) == ExperimentSpec()


def test_yaml_and_overrides_go_through_the_same_door(tmp_path: Path) -> None:
    path = write(tmp_path, "patch: {rank: 4, mask: {tau: 0.2}}")
    spec = load_spec(ExperimentSpec, path, ["patch.mask.tau=0.4", "resources.workers=0"])
    assert (spec.patch.rank, spec.patch.mask.tau, spec.resources.workers) == (4, 0.4, 0)


def test_the_last_override_wins() -> None:
    spec = load_spec(ExperimentSpec, None, ["patch.rank=2", "patch.rank=3"])
    assert spec.patch.rank == 3


def test_overrides_do_not_change_the_mapping_that_they_are_put_on() -> None:
    given = {"patch": {"rank": 4}}
    load_spec(ExperimentSpec, given, ["patch.rank=8"])
    assert given == {"patch": {"rank": 4}}


def test_a_spec_is_frozen_and_survives_a_round_trip() -> None:
    spec = load_spec(ExperimentSpec, None, ["quantize.method=bnb", "patch.steps=null"])
    assert spec.quantize == BnbSpec()
    assert (
        load_spec(ExperimentSpec, yaml.safe_load(yaml.safe_dump(spec.model_dump(mode="json"))))
        == spec
    )
    with pytest.raises(ValidationError):
        spec.name = "other"  # type: ignore[misc]


def test_a_quantizer_keeps_its_method_when_one_field_is_set() -> None:
    spec = load_spec(ExperimentSpec, None, ["quantize.bits=2"])
    assert spec.quantize == LlmQatSpec(bits=2)


def test_the_paper_objective_is_dpo_alone() -> None:
    objective = load_spec(PatchSpec, {"objective": "paper"}).objective
    assert (objective.dpo, objective.nll, objective.kl, objective.anchor) == (1, 0, 0, 0)
    assert objective.beta == 0.01


def test_risk_one_is_benign_only() -> None:
    assert load_spec(CalibrationSpec, {"risk": "I"}).harmful == 0


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "aqlm"])
def test_one_key_of_calibration_keeps_the_method_s_own_risk(method: str) -> None:
    chosen = [f"quantize.method={method}", "quantize.calibration.benign=128"]
    wanted = CalibrationSpec(risk="I", benign=128)
    assert load_spec(ExperimentSpec, None, chosen).quantize.calibration == wanted  # type: ignore[union-attr]
    nested = ["quantize.method=critical16", "quantize.base.method=gptq"]
    nested += ["quantize.base.calibration.benign=128"]
    assert load_spec(ExperimentSpec, None, nested).quantize.base.calibration == wanted  # type: ignore[union-attr]
    asked = load_spec(ExperimentSpec, None, [*chosen, "quantize.calibration.harmful=20"])
    assert asked.quantize.calibration == CalibrationSpec(benign=128, harmful=20)  # type: ignore[union-attr]
    preset = {"quantize": {"method": "llm_qat", "calibration": {"risk": "III"}}}
    kept = load_spec(ExperimentSpec, preset, [f"quantize.method={method}"])
    assert kept.quantize.calibration == CalibrationSpec()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (["patch.mask.tua=0.4"], ["patch.mask.tua", "tau", "--set"]),
        (["pacth.rank=1"], ["pacth", "patch"]),
        (["quantize.bit=4"], ["quantize.bit", "bits"]),
        (
            ["quantize.method=bnb", "quantize.format=int8", "quantize.double_quant=true"],
            ["double_quant is of nf4 and fp4", "--set"],
        ),
        (["quantize.method=llmqat"], ["llmqat", "llm_qat"]),
        (["patch.mask.tau=1.5"], ["patch.mask.tau", "1.5", "at most 1"]),
        (["patch.rank=many"], ["patch.rank", "'many'", "whole number"]),
        (["patch.lr=-1"], ["patch.lr", "more than 0"]),
        (["name=../escape"], ["name", "../escape"]),
        (["evaluate.generate.samples=3"], ["temperature"]),
        (["evaluate.generate.engine=openai"], ["endpoint"]),
        (["patch.objective=papr"], ["papr", "paper"]),
        (["patch.objective.kl=0"], ["every objective weight is 0"]),
        (["patch.rank"], ["patch.rank", "key=value"]),
        (["=3"], ["key=value"]),
        (["name.first=x", "name=[y"], ["name"]),
        (["name=x", "name.first=y"], ["name", "no keys of its own"]),
        (["evaluate.prompts=[{axes: harmful}]"], ["evaluate.prompts.0.axes", "did you mean axis"]),
        (["evaluate.judges=[llm]"], ["judge 'llm' needs settings: write {judge: llm, ...}"]),
        (["evaluate.judges=[{judge: lm}]"], ["unknown judge 'lm'", "did you mean llm"]),
        (
            ["evaluate.judges=[{judge: refusal}]"],
            ["takes no settings", "write refusal without braces"],
        ),
        (["evaluate.judges=[{judge: llm}]"], ["evaluate.judges.0.model", "must be given"]),
        (["evaluate.judges=[{judge: llm, modl: x}]"], ["evaluate.judges.0.modl", "model"]),
        (
            ["evaluate.judges=[{judge: llm, model: x, endpoint: 'http://k@h/v1'}]"],
            ["put the key into OPENAI_API_KEY"],
        ),
        (
            ["evaluate.judges=[{judge: classifier, path: x, template: llamaguard}]"],
            ["evaluate.judges.0.template", "'llama_guard'"],
        ),
        (["evaluate.prompts=[{axis: harmfull}]"], ["evaluate.prompts.0.axis", "harmfull"]),
    ],
)
def test_a_mistake_in_an_override_is_named(overrides: list[str], fragments: list[str]) -> None:
    text = message(None, *overrides)
    for fragment in fragments:
        assert fragment in text


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        ("patch: [", ["malformed YAML", "experiment.yaml"]),
        ("- 1", ["not a mapping", "experiment.yaml"]),
        ("patch: 3", ["patch", "experiment.yaml"]),
        ("patch: {mask: {tua: 1}}", ["patch.mask.tua", "did you mean tau", "experiment.yaml"]),
        ("model: {path: 7}", ["model.path", "must be text", "7"]),
        ("quantize: {method: rtn, bits: 5}", ["quantize.bits", "2, 3, 4 or 8", "5"]),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path: Path, content: str, fragments: list[str]) -> None:
    text = message(write(tmp_path, content))
    for fragment in fragments:
        assert fragment in text


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    assert "absent.yaml" in message(tmp_path / "absent.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    assert "binary.yaml" in message(binary)


def test_nearest_names_offer_all_when_none_is_near() -> None:
    assert nearest("tua", ["tau", "rank"]) == "did you mean tau?"
    assert nearest("xyzzy", ["tau", "rank"]) == "choose one of rank, tau"


def test_no_default_contradicts_its_own_checks() -> None:
    for kind in (ExperimentSpec, GenerateSpec, ObjectiveSpec, PatchSpec):
        assert kind.model_validate(kind().model_dump()) == kind()


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads(name: str) -> None:
    spec = load_experiment(name)
    assert spec.name == re.sub(r"-(\d+x)+[a-z]+\d+$", "", name)  # of what it runs on
    assert load_experiment(name, ["patch.rank=3"]).patch.rank == 3


def test_the_presets_of_the_readme_are_packaged() -> None:
    wanted = {"cpu-smoke", "demo", "demo-int2", "demo-thorough"}
    wanted |= {"llama2-7b-chat-int4-4xa100", "llama3-8b-instruct-nf4"}
    wanted |= {"llama2-7b-chat-int4-8xh100", "llama3-8b-instruct-nf4-8xh100"}
    wanted |= {"llama2-70b-chat-int4-2x8xh100"}
    assert wanted <= set(preset_names())


def test_presets_say_what_their_names_say() -> None:
    llama2 = load_experiment("llama2-7b-chat-int4-4xa100")
    assert llama2.quantize.bits == 4
    assert (llama2.resources.workers, llama2.resources.gpus_per_worker) == (4, 1)
    paper = llama2.patch
    assert (paper.mask.tau, paper.mask.remask_every) == (0.6, 1000)
    assert (paper.objective.beta, paper.lr, paper.rank, paper.alpha) == (0.01, 5e-6, 128, 256)
    assert load_experiment("llama3-8b-instruct-nf4").quantize == BnbSpec(format="nf4")
    assert load_experiment("demo-int2").quantize.bits == 2
    assert load_experiment("demo").quantize == ExperimentSpec().quantize
    assert load_experiment("demo-thorough").quantize == ExperimentSpec().quantize
    assert load_experiment("demo-thorough").patch.steps == 800


def test_an_unknown_preset_offers_the_nearest() -> None:
    with pytest.raises(SpecError, match="did you mean demo"):
        load_experiment("dem0")


def test_presets_are_found_from_anywhere(tmp_path: Path) -> None:
    code = "from qresafe.presets import load_experiment; print(load_experiment('demo').name)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "demo"


def test_a_yaml_file_may_say_on_without_quotes(tmp_path: Path) -> None:
    config = tmp_path / "e.yaml"
    config.write_text("patch: {mask: {on: factors}, through_grid: false}\ncontrol: True\n")
    spec = load_spec(ExperimentSpec, config)
    assert (spec.patch.mask.on, spec.patch.through_grid, spec.control) == ("factors", False, True)


def test_a_key_in_an_url_is_not_repeated() -> None:
    text = message(None, "evaluate.judges=[{judge: llm, model: x, endpoint: 'http://hunter2@h'}]")
    assert "hunter2" not in text


def test_another_base_method_leaves_the_keys_of_the_one_before() -> None:
    resolved = load_spec(ExperimentSpec, None, ["quantize.method=critical16"])
    held = resolved.model_dump(mode="json")  # what `qresafe show` prints, base: {bits: 4, ...}
    wanted = BnbSpec(format="fp4")
    spec = load_spec(ExperimentSpec, held, ["quantize.base.method=bnb", "quantize.base.format=fp4"])
    assert spec.quantize.base == wanted  # type: ignore[union-attr]
    change = {"quantize": {"base": {"method": "bnb", "format": "fp4"}}}
    assert with_changes(resolved, change) == spec


def test_a_nested_method_keeps_its_default_and_names_what_it_may_be() -> None:
    spec = load_spec(ExperimentSpec, None, ["quantize.method=qlora", "quantize.base.format=fp4"])
    assert spec.quantize.base == BnbSpec(format="fp4", double_quant=True)  # type: ignore[union-attr]
    spec = load_spec(ExperimentSpec, None, ["quantize.method=qlora", "quantize.base.format=int8"])
    assert spec.quantize.base == BnbSpec(format="int8")  # type: ignore[union-attr]
    own = ["quantize.method=qlora", "quantize.base.method=bnb"]
    assert load_spec(ExperimentSpec, None, own).quantize.base == BnbSpec()  # type: ignore[union-attr]
    bits = ["quantize.method=critical16", "quantize.base.bits=2"]
    assert load_spec(ExperimentSpec, None, bits).quantize.base.bits == 2  # type: ignore[union-attr]
    told = message(None, "quantize.method=qlora", "quantize.base.method=gptq")
    assert told == "gptq cannot be quantize.base in --set: choose one of bnb, rtn."
    assert "bits" in message(None, "quantize.method=critical16", "quantize.base.bit=2")


def test_a_key_below_a_part_that_has_a_judge_of_any_name() -> None:
    with pytest.raises(SpecError, match=r"unknown key 'pairs.teacher.x' in --set: choose one of"):
        load_experiment("demo", ["pairs.teacher.x=nan"])
