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


class AqlmSpec(Spec):
    """AQLM: sums of codebook vectors, codebooks x codebook_bits / group_size bits per weight.

    The paper's settings are 1 x 16 and 2 x 8 with groups of 8 (2 bits), 4 x 8 is 4 bits; codebooks
    come on top, so small layers want small ones.
    """

    method: Literal["aqlm"] = "aqlm"
    codebooks: Annotated[int, Field(ge=1, le=16)] = 2
    codebook_bits: Annotated[int, Field(ge=2, le=16)] = 8
    group_size: AtLeastOne = 8
    skip: tuple[str, ...] = ("lm_head",)
    calibration: CalibrationSpec = CalibrationSpec(risk="I")
    sequences: AtLeastOne = 1024
    max_length: AtLeastOne = 2048
    batch_size: AtLeastOne = 16
    beam: AtLeastOne = 8  # hypotheses per group of the code search
    rounds: AtLeastOne = 20  # most turns of codes, codebooks and scales
    tolerance: Positive = 0.01  # a layer is done when a turn gains less than this share
    finetune_steps: Count = 100  # per block; 0: without fine-tuning
    finetune_lr: Positive = 1e-4
    seed: int = 0


QuantizeSpec = Annotated[
    RtnSpec | BnbSpec | LlmQatSpec | AqlmSpec,
    Field(discriminator="method"),
]
