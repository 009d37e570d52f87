"""Results by category and language, and what a comparison tells of its prompts."""

from pathlib import Path

import pyarrow as pa
import pytest
from fabricated import REFUSAL, arm, row

from qresafe.artifacts import Run
from qresafe.benchmarks.base import with_sources
from qresafe.hf.models import resolve
from qresafe.hf.warm import ModelInput
from qresafe.progress import Silent
from qresafe.records import PROMPT
from qresafe.specs import GenerateSpec, ModelSpec
from qresafe.stages.compare import compare, read_comparison
from qresafe.stages.comparison import ArmResult, Comparison, Contamination
from qresafe.stages.generate import generate
from qresafe.stages.judge import judge
from qresafe.stages.runtime import InProcessRuntime

DELIVERS = "Step one: take it. Step two: use it."


def result(tmp_path: Path, rows: list[dict]) -> ArmResult:
    run = Run(str(tmp_path), "r")
    return read_comparison(compare(run, {"W": arm(run, "W", rows)}, Silent())).arms[0]


def test_shares_by_category_and_language(tmp_path: Path) -> None:
    rows = [
        row("harmful", 0, DELIVERS, category="fraud", lang="en", benchmark="a"),
        row("harmful", 1, REFUSAL, category="fraud", lang="fr", benchmark="a"),
        row("harmful", 2, DELIVERS, category="fraud", lang="fr", benchmark="b"),
        row("harmful", 3, DELIVERS, category=None, lang=None, benchmark="b"),
    ]
    found = result(tmp_path, rows)
    shares = {
        name: (s["compliance"].yes, s["compliance"].n) for name, s in found.by_category.items()
    }
    # The same word in two benchmarks is two categories; the row without one is in none.
    assert shares == {"a: fraud": (1, 2), "b: fraud": (1, 1)}
    languages = {
        name: (s["compliance"].yes, s["compliance"].n) for name, s in found.by_language.items()
    }
    assert languages == {"en": (1, 1), "fr": (1, 2)}
    assert found.measures["compliance"].yes == 3


def test_one_group_is_no_split(tmp_path: Path) -> None:
    found = result(tmp_path, [row("harmful", i, REFUSAL, category="c", lang="en") for i in (0, 1)])
    assert found.by_category == found.by_language == {}


def test_contamination_and_sources_are_told(tiny_llama: Path, tmp_path: Path) -> None:
    run, told = Run(str(tmp_path), "r"), {"title": "t", "licence": "MIT", "citation": "c"}
    rows = [{"prompt_id": "a", "axis": "harmful", "prompt": "p", "benchmark": "advbench"}]
    prompts = with_sources(
        pa.Table.from_pylist(rows, schema=PROMPT), {"advbench": told | {"origin": "x.csv"}}
    )
    completions = generate(
        run,
        label="W",
        model=ModelInput.of(resolve(ModelSpec(path=str(tiny_llama)))),
        prompts=prompts,
        spec=GenerateSpec(max_new_tokens=2),
        runtime=InProcessRuntime(),
        progress=Silent(),
    )
    arms = {"W": (completions, judge(run, completions, ["refusal"], Silent()))}
    leak = Contamination(
        calibration=9, evaluation=1, exact=1, near=2, measure="m", threshold=0.8, highest_kept=0.1
    )
    with_leak = compare(run, arms, Silent(), contamination=leak)
    without = compare(run, arms, Silent())
    assert with_leak.key != without.key
    assert read_comparison(with_leak).contamination == leak
    assert read_comparison(without).contamination is None
    assert read_comparison(without).sources["advbench"].licence == "MIT"


def test_a_comparison_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    run = Run(str(tmp_path), "r")
    made = compare(run, {"W": arm(run, "W", [row("harmful", 0, REFUSAL)])}, Silent())
    data = read_comparison(made).model_dump(
        exclude={
            "contamination": True,
            "sources": True,
            "attacks": True,
            "arms": {0: {"by_category", "by_language"}},
        }
    )
    assert Comparison.model_validate(data).attacks == []
    with pytest.raises(ValueError, match="nonsense"):
        Comparison.model_validate(data | {"nonsense": 1})
