"""lm-evaluation-harness: refused in words where it is missing, run for real where it is there."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from qresafe.errors import ResourceError, SpecError
from qresafe.hf import harness
from qresafe.hf.models import load_model, resolve
from qresafe.specs import ModelSpec

INSTALLED = importlib.util.find_spec("lm_eval") is not None


def test_without_the_extra_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"pip install 'qresafe\[harness\]'"):
        harness.harness_version()


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with one multiple-choice task on a local file."""
    rows = [{"q": "2 + 2 =", "choices": ["4", "5"], "label": i % 2} for i in range(4)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "qresafe_sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "sums.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "sums.yaml").write_text(yaml.safe_dump(task))
    return tmp_path


@pytest.mark.skipif(not INSTALLED, reason="lm_eval (extra `harness`) is not installed")
def test_a_local_task_through_its_own_api(tiny_llama: Path, tasks: Path) -> None:
    ref = resolve(ModelSpec(path=str(tiny_llama)))
    found = harness.evaluate(ref, ["qresafe_sums"], include=str(tasks))
    # Both choices are right in half of the documents, so whatever the model prefers scores 1/2.
    assert found["qresafe_sums"]["acc,none"] == 0.5


@pytest.mark.skipif(not INSTALLED, reason="lm_eval (extra `harness`) is not installed")
def test_the_model_is_the_one_that_answers(
    tiny_llama: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is loaded as for answers, with what lies beside the codes."""
    loaded: list[str] = []

    def load(path: str, **options: object) -> object:
        loaded.append(str(path))
        return load_model(path, **options)

    monkeypatch.setattr(harness, "load_model", load)
    harness.evaluate(resolve(ModelSpec(path=str(tiny_llama))), ["qresafe_sums"], include=str(tasks))
    assert loaded == [str(tiny_llama)]


@pytest.mark.skipif(not INSTALLED, reason="lm_eval (extra `harness`) is not installed")
def test_an_unknown_task_is_named(tiny_llama: Path) -> None:
    ref = resolve(ModelSpec(path=str(tiny_llama)))
    with pytest.raises(SpecError, match="no task 'qresafe_nothing'"):
        harness.evaluate(ref, ["qresafe_nothing"])
