"""How W is quantized: one spec per method, with the defaults of its paper or library."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qresafe.spec_base import AtLeastOne, Count, Positive, Spec, Weight


class CalibrationSpec(Spec):
    """Chats that a fine-tuning quantizer sees: the paper's risk levels."""

    risk: Literal["I", "II", "III"] = "III"  # I benign, II obedient-agent dialogues, III + harmful
    benign: Count = 90
    harmful: Count = 10  # only at risk III
    obedient: Count = 10  # only at risk II, which has nothing else
    # Chats with a column `messages` instead of the embedded templates: a JSONL file, a datasets
    # folder or a hub id such as HuggingFaceH4/ultrachat_200k.
    path: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _benign_by_risk(cls, data: Any) -> Any:
        # Risk I is the paper's "fine-tuning on ordinary chats": hundreds of them, none harmful.
        if isinstance(data, dict) and data.get("risk") == "I":
            return {"benign": 500, "harmful": 0} | data
        return data


class RtnSpec(Spec):
    """Round to nearest: no data, no training."""

    method: Literal["rtn"] = "rtn"
    bits: Literal[2, 3, 4, 8] = 4
    group_size: Annotated[int, Field(ge=-1)] = 64  # -1: one group per output channel
    symmetric: bool = False
    skip: tuple[str, ...] = ("lm_head",)


class BnbSpec(Spec):
    """bitsandbytes: NF4, FP4 or LLM.int8()."""

    method: Literal["bnb"] = "bnb"
    format: Literal["nf4", "fp4", "int8"] = "nf4"
    double_quant: bool = False
    skip: tuple[str, ...] = ("lm_head",)


class LlmQatSpec(Spec):
    """Quantization-aware fine-tuning with a straight-through estimator (LLM-QAT)."""

    method: Literal["llm_qat"] = "llm_qat"
    bits: Literal[2, 3, 4, 8] = 4
    group_size: Annotated[int, Field(ge=-1)] = 64
    symmetric: bool = False
    skip: tuple[str, ...] = ("lm_head",)
    activation_bits: Literal[4, 8, 16] = 16  # 16: activations are left alone
    kv_bits: Literal[4, 8, 16] = 16
    loss: Literal["cross_entropy", "self_distill"] = "cross_entropy"
    calibration: CalibrationSpec = CalibrationSpec()
    steps: AtLeastOne = 40
    batch_size: AtLeastOne = 32
    lr: Positive = 2e-4
    weight_decay: Weight = 0.0
    # Adam's 1e-8 lets a self-distillation control drift on float noise (DESIGN section 8, point 8).
    adam_eps: Positive = 1e-8
    seed: int = 0


class GptqSpec(Spec):
    """GPTQ (Frantar et al. 2022), with llm-compressor's defaults."""

    method: Literal["gptq"] = "gptq"
    bits: Literal[2, 3, 4, 8] = 4
    group_size: Annotated[int, Field(ge=-1)] = 128
    symmetric: bool = True
    skip: tuple[str, ...] = ("lm_head",)
    # static: columns with large inputs first, groups as they lie. Groups in that order too
    # ("group", g_idx) are gone from llm-compressor 0.14, and transformers would misread them.
    act_order: Literal["none", "static"] = "static"
    damp: Positive = 0.01  # of the Hessian's mean diagonal
    block_size: AtLeastOne = 128  # columns between two updates of the rest
    calibration: CalibrationSpec = CalibrationSpec(risk="I")
    sequences: AtLeastOne = 512
    max_length: AtLeastOne = 2048
    seed: int = 0


class AwqSpec(Spec):
    """AWQ (Lin et al. 2023), with its authors' 128 sequences of 512 tokens."""

    method: Literal["awq"] = "awq"
    bits: Literal[3, 4, 8] = 4
    group_size: Annotated[int, Field(ge=-1)] = 128
    symmetric: bool = False
    skip: tuple[str, ...] = ("lm_head",)
    duo_scaling: bool = True  # scales from weights and activations, not activations alone
    grid_points: Annotated[int, Field(ge=3)] = 20  # exponents tried per layer
    calibration: CalibrationSpec = CalibrationSpec(risk="I")
    sequences: AtLeastOne = 128
    max_length: AtLeastOne = 512
    seed: int = 0


class Fp8Spec(Spec):
    """8-bit floats (E4M3), with llm-compressor's defaults."""

    method: Literal["fp8"] = "fp8"
    scales: Literal["channel", "tensor"] = "channel"
    # none: weights only; dynamic: by token at run time; static: one scale from calibration
    activations: Literal["none", "static", "dynamic"] = "dynamic"
    skip: tuple[str, ...] = ("lm_head",)
    calibration: CalibrationSpec = CalibrationSpec(risk="I")  # for static activations
    sequences: AtLeastOne = 512
    max_length: AtLeastOne = 2048
    seed: int = 0


QuantizeSpec = Annotated[
    RtnSpec | BnbSpec | LlmQatSpec | GptqSpec | AwqSpec | Fp8Spec,
    Field(discriminator="method"),
]
