"""Completions by vLLM through `ray.data.llm`, on GPUs.

vLLM is no dependency of qresafe: it is asked for by name, and a missing one is said in a sentence.
Prompts go in as the token ids that every other engine gets too, so that templates cannot differ.
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
import ray.data
from upath import UPath

from qresafe import metrics
from qresafe.hf.chat import end_id
from qresafe.hf.models import load_tokenizer
from qresafe.specs import GenerateSpec, ResourcesSpec
from qresafe.stages.engines import ANSWER, VllmJob, answer_row
from qresafe.stages.runtime import Batch, Made, Row, part_path, record_batch, write_table
from qresafe.stages.served import check_vllm

ERROR = "__inference_error__"  # ray.data.llm's column for rows that failed


def processor_config(job: VllmJob, resources: ResourcesSpec) -> Any:
    """Return the `vLLMEngineProcessorConfig` for a job: one engine per worker, errors as rows."""
    from ray.data.llm import vLLMEngineProcessorConfig

    ref, gpus = job.model.ref, int(resources.gpus_per_worker)
    return vLLMEngineProcessorConfig(
        model_source=ref.path,
        engine_kwargs={
            "dtype": ref.dtype,
            "tensor_parallel_size": gpus,
            "trust_remote_code": ref.trust_remote_code,
            "seed": job.spec.seed,
        },
        batch_size=job.spec.batch_size,
        concurrency=(1, resources.workers),
        should_continue_on_error=True,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )


def stops(tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer; vLLM adds those of the model's own configuration."""
    return sorted({int(tokenizer.eos_token_id), end_id(tokenizer)})


def sampling_params(row: Row, spec: GenerateSpec, stop_token_ids: list[int]) -> dict[str, Any]:
    """Return vLLM's sampling settings of one request, with a seed of its own."""
    digest = hashlib.sha256(f"{spec.seed}/{row['prompt_id']}/{row['sample']}".encode()).digest()
    return {
        "max_tokens": spec.max_new_tokens,
        "temperature": spec.temperature,
        "top_p": spec.top_p,
        "top_k": spec.top_k or -1,  # vLLM's word for all
        "seed": int.from_bytes(digest[:4], "little"),
        "stop_token_ids": stop_token_ids,
        "detokenize": False,
    }


def engine_rows(job: VllmJob, batches: Sequence[Batch]) -> list[Row]:
    """Return one input row of vLLM's stage per request; `batch` and `place` lead back to it."""
    ends = stops(_tokenizer(job))
    return [
        {
            "batch": batch.index,
            "place": place,
            "tokenized_prompt": row["prompt_ids"],
            "sampling_params": sampling_params(row, job.spec, ends),
        }
        for batch in batches
        for place, row in enumerate(batch.rows)
    ]


def _tokenizer(job: VllmJob) -> Any:
    ref = job.model.ref
    return load_tokenizer(ref.path, trust_remote_code=ref.trust_remote_code)


def compute(
    job: VllmJob, batches: Sequence[Batch], parts: UPath, *, resources: ResourcesSpec
) -> Iterator[Made]:
    """Compute batches and yield each when its last row is there and its part is written.

    Raises:
        ResourceError: No vLLM, or no GPU for each worker.
    """
    check_vllm(resources)
    from ray.data.llm import build_processor

    processor = build_processor(processor_config(job, resources))
    rows = ray.data.from_items(engine_rows(job, batches), override_num_blocks=len(batches))
    yield from collect(processor(rows).iter_rows(), job, batches, parts)


def collect(
    results: Iterable[Row], job: VllmJob, batches: Sequence[Batch], parts: UPath
) -> Iterator[Made]:
    """Write the part of each batch as soon as all its rows have come, in whatever order."""
    began = time.time()
    tokenizer = _tokenizer(job)
    asked = {batch.index: batch.rows for batch in batches}
    came: dict[int, dict[int, Row]] = defaultdict(dict)
    for result in results:
        index, place = int(result["batch"]), int(result["place"])
        came[index][place] = answer(asked[index][place], result, tokenizer)
        if len(came[index]) == len(asked[index]):
            answers = [row for _, row in sorted(came.pop(index).items())]
            table = pa.Table.from_pylist(answers, schema=ANSWER)
            write_table(part_path(parts, index), table)
            made = Made(index, len(answers), sum(row["new_tokens"] for row in answers), began)
            record_batch(made, table, metrics.place(parts))
            yield made


def answer(request: Row, result: Row, tokenizer: Any) -> Row:
    """Return the row of `ANSWER` for one result of vLLM's stage."""
    if result.get(ERROR):
        reason = " ".join(str(result[ERROR]).split())[:200]
        return answer_row(request, finish="error", error=f"vllm: {reason}")
    ids = [int(token) for token in result["generated_tokens"]]
    return answer_row(
        request,
        text=tokenizer.decode(ids, skip_special_tokens=True),
        ids=ids,
        finish="stop" if ids[-1:] and ids[-1] in stops(tokenizer) else "length",
    )
