"""Everything about engine `vllm` but the engine itself, which needs a GPU and its package."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
from upath import UPath

from qresafe.dist import vllm
from qresafe.errors import DataError, ResourceError
from qresafe.hf.models import resolve
from qresafe.hf.warm import ModelInput
from qresafe.specs import GenerateSpec, ModelSpec, ResourcesSpec
from qresafe.stages.engines import VllmJob
from qresafe.stages.runtime import Batch, part_path, read_table
from qresafe.stages.served import check_vllm

GPUS = ResourcesSpec(workers=3, gpus_per_worker=2)


@pytest.fixture
def job(tiny_llama: Path) -> VllmJob:
    model = ModelInput.of(resolve(ModelSpec(path=str(tiny_llama), dtype="bfloat16")))
    return VllmJob(model, GenerateSpec(engine="vllm", max_new_tokens=9, temperature=0.7, seed=4))


@pytest.fixture
def batches(job: VllmJob) -> list[Batch]:
    prompts = [{"prompt_id": f"p{i}", "prompt": f"hello {i}", "target": "x"} for i in range(3)]
    rows = [row | {"sample": 0} for row in job.requests(prompts)]
    assert all(row["target_ids"] == [] for row in rows)
    return [Batch(0, rows[:2]), Batch(1, rows[2:])]


def test_the_processor_is_set_up_as_the_spec_says(job: VllmJob, tiny_llama: Path) -> None:
    config = vllm.processor_config(job, GPUS)
    assert config.model_source == str(tiny_llama)
    assert config.engine_kwargs["tensor_parallel_size"] == 2
    assert config.engine_kwargs["dtype"] == "bfloat16"
    assert config.get_concurrency() == {"min_size": 1, "max_size": 3}
    assert config.should_continue_on_error
    stages = (config.chat_template_stage, config.tokenize_stage, config.detokenize_stage)
    assert not any(stages)


def test_requests_carry_tokens_and_a_seed_of_their_own(job: VllmJob, batches: list[Batch]) -> None:
    rows = vllm.engine_rows(job, batches)
    assert [(row["batch"], row["place"]) for row in rows] == [(0, 0), (0, 1), (1, 0)]
    assert rows[0]["tokenized_prompt"] == batches[0].rows[0]["prompt_ids"]
    params = [row["sampling_params"] for row in rows]
    assert len({p["seed"] for p in params}) == 3
    assert params == [row["sampling_params"] for row in vllm.engine_rows(job, batches)]
    expected = {"max_tokens": 9, "temperature": 0.7, "top_p": 1.0, "top_k": -1}
    assert expected.items() <= params[0].items()
    assert params[0]["stop_token_ids"] == [2]


@pytest.mark.parametrize("name", ["adapter_config.json", "critical16.safetensors"])
def test_what_vllm_would_leave_out_is_refused(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "q"))
    (folder / name).write_text("{}")
    job = VllmJob(ModelInput.in_folder(folder, "q"), GenerateSpec(engine="vllm"))
    with pytest.raises(DataError, match=f"would leave out {name}"):
        job.requests([{"prompt_id": "p", "prompt": "hello", "target": None}])


def test_results_come_back_in_any_order_with_errors_as_rows(
    job: VllmJob, batches: list[Batch], tmp_path: Path
) -> None:
    hello = [80, 81, 82]
    results = [
        {"batch": 0, "place": 1, "generated_tokens": [*hello, 2], vllm.ERROR: ""},
        {"batch": 1, "place": 0, "generated_tokens": hello * 3, vllm.ERROR: ""},
        {"batch": 0, "place": 0, "generated_tokens": [], vllm.ERROR: "prompt too long"},
    ]
    parts = UPath(tmp_path)
    made = list(vllm.collect(results, job, batches, parts))
    assert [(m.index, m.rows, m.new_tokens) for m in made] == [(1, 1, 9), (0, 2, 4)]
    failed, stopped = read_table(part_path(parts, 0)).to_pylist()
    assert (failed["prompt_id"], failed["error"]) == ("p0", "vllm: prompt too long")
    assert (stopped["finish"], stopped["completion_ids"]) == ("stop", [*hello, 2])
    assert read_table(part_path(parts, 1))["finish"].to_pylist() == ["length"]


def test_a_missing_gpu_or_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match="needs a GPU for each worker"):
        check_vllm(ResourcesSpec(workers=1))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match="vllm is not installed"):
        check_vllm(GPUS)
