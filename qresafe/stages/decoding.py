"""How calibration prompts are answered: greedily, whatever the evaluation's decoding is."""

from __future__ import annotations

from qresafe.specs import ExperimentSpec, GenerateSpec, TeacherSpec


def calibration_decoding(spec: ExperimentSpec) -> GenerateSpec:
    """Return how W and Q0 answer the calibration prompts of an experiment."""
    asked = spec.evaluate.generate
    return GenerateSpec(
        engine=asked.engine if asked.engine != "openai" else "transformers",
        max_new_tokens=spec.pairs.max_new_tokens,
        batch_size=asked.batch_size,
    )


def teacher_decoding(spec: ExperimentSpec, teacher: TeacherSpec) -> GenerateSpec:
    """Return how another teacher than W answers them, here or at its endpoint."""
    decoding = calibration_decoding(spec).model_dump() | {"system_prompt": teacher.system_prompt}
    if teacher.endpoint:
        server = {"endpoint": teacher.endpoint, "endpoint_model": teacher.endpoint_model}
        decoding |= {"engine": "openai"} | server
    return GenerateSpec.model_validate(decoding)
