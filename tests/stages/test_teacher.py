"""Another teacher than W: whose answers are learned from, and what can be learned of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import save_tiny_llama
from servers import ChatServer, serving

from qresafe.errors import ModelError, SpecError
from qresafe.loading import load_spec
from qresafe.specs import ExperimentSpec
from qresafe.stages.experiment import Experiment
from qresafe.stages.runtime import InProcessRuntime, read_table

REFUSAL = "I'm sorry, but I can't help with that."
TEXTS = {"nll": 1.0, "kl": 0.0}  # an objective that needs the teacher's words only


def experiment(storage: Path, w: Path, teacher: dict[str, Any], **objective: float) -> Experiment:
    pool = {"harmful": 6, "benign": 3, "borderline": 2, "recombined": 0, "max_new_tokens": 8}
    spec = {
        "storage": str(storage),
        "model": {"path": str(w)},
        "quantize": {"method": "rtn", "bits": 4, "group_size": 32},
        "pairs": pool | {"teacher": teacher},
        "patch": {"objective": objective, "steps": 2, "batch_size": 8, "micro_batch_size": 8},
    }
    return Experiment(load_spec(ExperimentSpec, spec), InProcessRuntime(threads=1))


def pair_rows(made: Experiment) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_table(made.pairs.path / "pairs.parquet").to_pylist()
    return rows


def test_an_endpoint_teaches_by_its_words(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server refuses all: every harmful prompt is a pair, in Q0's own tokens."""
    monkeypatch.setenv("OPENAI_API_KEY", "right")
    server = ChatServer(lambda body: REFUSAL)
    with serving(server) as url:
        teacher = {"endpoint": url, "endpoint_model": "toy", "system_prompt": "Be careful."}
        made = experiment(tmp_path, tiny_llama, teacher, **TEXTS)
        made.check()
        rows = pair_rows(made)
        assert made.patched.manifest.counts["steps"] == 2
    assert {row["chosen"] for row in rows} == {REFUSAL}
    assert sum(row["preference"] for row in rows) == 6
    decoded = {made.tokenizer.decode(r["chosen_ids"], skip_special_tokens=True) for r in rows}
    assert decoded == {REFUSAL}
    assert all(row["teacher_ids"] is None for row in rows)
    assert {body["messages"][0]["content"] for body in server.bodies} == {"Be careful."}


def test_a_model_of_the_same_tokens_teaches_its_distributions_too(
    tmp_path: Path, tiny_llama: Path
) -> None:
    other = save_tiny_llama(tmp_path / "other", hidden=32, seed=7)
    made = experiment(tmp_path, tiny_llama, {"model": {"path": str(other)}}, kl=1.0)
    made.check()
    assert all(row["teacher_ids"] for row in pair_rows(made))
    own = experiment(tmp_path, tiny_llama, {"model": {"path": str(tiny_llama)}}, kl=1.0)
    assert {row["chosen"] for row in pair_rows(made)} != {row["chosen"] for row in pair_rows(own)}


@pytest.mark.parametrize("system_prompt", [None, "Be careful."])
def test_distributions_of_other_tokens_or_prompts_cannot_be_learned(
    tmp_path: Path, tiny_llama: Path, system_prompt: str | None
) -> None:
    name = str(tiny_llama) if system_prompt else "embedded"
    teacher = {"model": {"path": name}, "system_prompt": system_prompt}
    with pytest.raises(SpecError, match=r"kl term needs the teacher's token distributions"):
        experiment(tmp_path, tiny_llama, teacher, kl=1.0).check()
    made = experiment(tmp_path, tiny_llama, teacher, **TEXTS)
    made.check()
    assert all(row["teacher_ids"] is None for row in pair_rows(made))


def test_a_teacher_is_checked_before_the_work(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "right")
    nobody = {"endpoint": "http://127.0.0.1:9/v1", "endpoint_model": "toy"}
    with pytest.raises(ModelError, match="no answer"):
        experiment(tmp_path, tiny_llama, nobody, **TEXTS).check()
    with pytest.raises(SpecError, match="either a model or an endpoint"):
        experiment(tmp_path, tiny_llama, {}, **TEXTS)
