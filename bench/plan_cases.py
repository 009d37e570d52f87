"""The cases of `bench.plan`, and what the memory model says of each."""

from __future__ import annotations

from typing import Any

from qresafe.planning import memory
from qresafe.planning.flipping import flips
from qresafe.planning.memory import Batch, Parts, Patching
from qresafe.planning.shapes import ModelShape, from_config
from qresafe.specs import PatchSpec

PROMPT = 48


def shape(
    hidden: int, inner: int, blocks: int, heads: int, keys: int, words: int
) -> dict[str, int]:
    """Return a Llama's config."""
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": words,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "even": shape(512, 1408, 6, 8, 8, 8192),
    "wide": shape(1024, 3584, 2, 16, 4, 4096),  # and with grouped key heads
    "deep": shape(256, 704, 24, 4, 4, 4096),
    "tall": shape(192, 528, 24, 4, 4, 4096),  # SNIP's sums, 43 MB, stay in memory
    "words": shape(384, 1024, 4, 6, 6, 48000),
}
DPO = {"dpo": 1.0, "kl": 0.0, "beta": 0.1}
KL = {"dpo": 0.0, "kl": 1.0, "kl_tokens": 64}


def patch_case(shape: str, answer: int = 64, rows: int = 4, **changes: Any) -> dict[str, Any]:
    """Return a case that takes two steps of the patch, each after a re-masking."""
    mask = {"on": changes.pop("on", "weight"), "remask_every": 1, "samples": rows}
    patch = {"objective": DPO, "rank": 16, "alpha": 32, "steps": 2, "mask": mask}
    patch |= {"batch_size": rows, "micro_batch_size": rows} | changes
    dtype = patch.pop("dtype", "float32")
    return {
        "stage": "patch",
        "shape": shape,
        "dtype": dtype,
        "group_size": 64,
        "answer": answer,
        "patch": patch,
    }


def flips_case(shape: str, rows: int = 4, **changes: Any) -> dict[str, Any]:
    """Return a case that takes two rounds of code flips."""
    sizes = {"rows": rows, "probe_rows": rows, "at_once": 2}
    return patch_case(shape, rows=rows, method="flips", flips=sizes, **changes)


def generate_case(shape: str, dtype: str = "float32") -> dict[str, Any]:
    """Return a case that answers one batch of prompts."""
    return {"stage": "generate", "shape": shape, "dtype": dtype, "rows": 64, "answer": 128}


def training_case(rounded: bool, shape: str = "even", **settings: Any) -> dict[str, Any]:
    """Return a case that takes two steps of LLM-QAT, or of its control."""
    given = {"stage": "llm_qat", "shape": shape, "rows": 8, "answer": 64, "group_size": 64}
    return given | {"rounded": rounded, "optimizer": "adamw", "recompute": False} | settings


CASES: dict[str, dict[str, Any]] = {
    "patch, DPO": patch_case("even"),
    "patch, DPO, bfloat16": patch_case("even", dtype="bfloat16"),
    "patch, DPO, long answers": patch_case("even", answer=400),
    "patch, DPO, wide": patch_case("wide"),
    "patch, DPO, deep": patch_case("deep"),
    "patch, DPO, large vocabulary": patch_case("words", answer=128),
    "patch, KL, large vocabulary": patch_case("words", answer=64, rows=6, objective=KL),
    "patch, rank 256": patch_case("even", rank=256),
    "patch, factors": patch_case("even", on="factors", through_grid=False),
    "patch, factors, bfloat16": patch_case(
        "deep", on="factors", through_grid=False, dtype="bfloat16"
    ),
    "patch, factors through the grid": patch_case("even", on="factors"),
    "patch, many blocks": patch_case("tall", answer=128),
    "patch, many blocks, recomputed": patch_case("tall", answer=128, gradient_checkpointing=True),
    "patch, many blocks, recomputed, bfloat16": patch_case(
        "tall", answer=128, gradient_checkpointing=True, dtype="bfloat16"
    ),
    "patch, long answers, recomputed": patch_case("even", answer=400, gradient_checkpointing=True),
    "patch, factors, recomputed": patch_case(
        "tall", answer=128, on="factors", through_grid=False, gradient_checkpointing=True
    ),
    "patch, four micro-batches": patch_case("even", rows=8, micro_batch_size=2),
    "flips": flips_case("even"),
    "flips, bfloat16": flips_case("wide", dtype="bfloat16"),
    "flips, many blocks": flips_case("tall", answer=128),
    "flips, many blocks, recomputed": flips_case("tall", answer=128, gradient_checkpointing=True),
    "generate": generate_case("even"),
    "generate, grouped heads": generate_case("wide"),
    "generate, bfloat16": generate_case("deep", "bfloat16"),
    "llm_qat": training_case(rounded=True),
    "llm_qat, control": training_case(rounded=False),
    "llm_qat, 8-bit moments": training_case(rounded=True, optimizer="adamw8bit"),
    "llm_qat, recomputed": training_case(rounded=True, shape="tall", recompute=True),
    "llm_qat, recomputed, 8-bit moments": training_case(
        rounded=True, shape="tall", recompute=True, optimizer="adamw8bit"
    ),
}


def predicted(case: dict[str, Any], device: str) -> Parts:
    """Return what the model says of a case."""
    shape = from_config(SHAPES[case["shape"]] | {"dtype": case.get("dtype", "float32")}, "case")
    kind = "gpu" if device == "cuda" else "cpu"
    answer, columns = case["answer"], PROMPT + case["answer"]
    if case["stage"] == "generate":
        return memory.generate(shape, Batch(case["rows"], columns, answer))
    if case["stage"] == "llm_qat":
        batch = Batch(case["rows"], columns, case["rows"] * answer)
        return memory.full_training(
            shape,
            batch,
            rounded=case["rounded"],
            teacher=False,
            device=kind,
            moments=memory.MOMENTS[case["optimizer"]],
            checkpointing=case["recompute"],
        )
    return _patch(case, shape, kind)


def _patch(case: dict[str, Any], shape: ModelShape, kind: Any) -> Parts:
    spec = PatchSpec.model_validate(case["patch"])
    answer, columns = case["answer"], PROMPT + case["answer"] - 1
    rows = spec.micro_batch_size
    answers = 2 if spec.objective.dpo else 1
    kl = rows * min(answer, spec.objective.kl_tokens) if spec.objective.kl else 0
    batch = Batch(answers * rows, columns, answers * rows * answer, kl)
    how = Patching(
        rank=spec.rank,
        on=spec.mask.on,
        through_grid=spec.through_grid,
        group_size=case["group_size"],
        bits=4,  # as `plan_case.quantized` rounds
        accumulates=spec.batch_size > spec.micro_batch_size,
        checkpointing=spec.gradient_checkpointing,
        device=kind,
    )
    if spec.method == "flips":
        return flips(shape, how, batch)
    return memory.patch(shape, how, batch, Batch(rows, columns, rows * answer))
