"""How W is quantized: one spec per method, with the defaults of its paper or library."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from qresafe.spec_base import AtLeastOne, Count, Fraction, Positive, Spec, Weight


class CalibrationSpec(Spec):
    """Chats that a fine-tuning quantizer sees: the paper's risk levels."""

    risk: Literal["I", "II", "III"] = "III"  # I benign, II obedient-agent dialogues, III + harmful
    benign: Count = 90
    harmful: Count = 10  # only at risk III
    obedient: Count = 10  # only at risk II, which has nothing else
    # Chats with a column `messages` instead of the embedded templates: a JSONL file, a datasets
    # folder or a hub id such as HuggingFaceH4/ultrachat_200k; in its own order, first rows first.
    path: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _benign_by_risk(cls, data: Any) -> Any:
        # Risk I is the paper's "fine-tuning on ordinary chats": hundreds of them, none harmful.
        if isinstance(data, dict) and data.get("risk") == "I":
            return {"benign": 500, "harmful": 0} | data
        return data


def _benign_unless_asked(data: Any) -> Any:
    # A method that only looks at chats has risk I for its default, and one key under
    # `calibration` must not make that the risk III of those that learn.
    if isinstance(data, dict) and not data.get("harmful"):
        return {"risk": "I"} | data
    return data


LookedAt = Annotated[CalibrationSpec, BeforeValidator(_benign_unless_asked)]


def _some_weights(size: int) -> int:
    if size != -1 and size < 1:
        raise ValueError("must be 1 or more weights, or -1 for one group per row")
    return size


GroupSize = Annotated[int, AfterValidator(_some_weights)]


class RtnSpec(Spec):
    """Round to nearest: no data, no training."""

    method: Literal["rtn"] = "rtn"
    bits: Literal[2, 3, 4, 8] = 4
    group_size: GroupSize = 64
    symmetric: bool = False
    skip: tuple[str, ...] = ("lm_head",)


class BnbSpec(Spec):
    """bitsandbytes: NF4, FP4 or LLM.int8()."""

    method: Literal["bnb"] = "bnb"
    format: Literal["nf4", "fp4", "int8"] = "nf4"
    double_quant: bool = False  # the scales are quantized too
    skip: tuple[str, ...] = ("lm_head",)

    @model_validator(mode="after")
    def _four_bits_for_double(self) -> BnbSpec:
        if self.double_quant and self.format == "int8":
            raise ValueError("double_quant is of nf4 and fp4; set it to false for format int8")
        return self


class SafetySpec(Spec):
    """What safety-in-mind LLM-QAT adds to its loss: terms on W's own answers."""

    dpo: Weight = 1.0  # W's refusals over what plain fine-tuning answers instead
    anchor: Weight = 1.0  # -log p of W's answers to benign and borderline prompts
    beta: Positive = 0.1  # of the DPO loss, with W as its reference
    harmful: Count = 300  # calibration prompts of each kind, of the embedded pool or `path`
    benign: Count = 150
    borderline: Count = 150
    path: str | None = None  # a file with columns prompt, axis instead of the embedded pool
    batch_size: AtLeastOne = 16  # rows of each term at every step
    judge: str = "keyword"  # decides which answers are refusals
    max_new_tokens: AtLeastOne = 64

    @model_validator(mode="after")
    def _terms_with_rows(self) -> SafetySpec:
        if not (self.dpo or self.anchor):
            raise ValueError("both terms have weight 0; leave out quantize.safety, or weigh one")
        if self.dpo and not self.harmful:
            raise ValueError("the dpo term needs harmful prompts; raise harmful, or set dpo to 0")
        if self.anchor and not (self.benign or self.borderline):
            raise ValueError("the anchor term needs prompts; raise benign, or set anchor to 0")
        return self


class LlmQatSpec(Spec):
    """Quantization-aware fine-tuning with a straight-through estimator (LLM-QAT)."""

    LATER: ClassVar[frozenset[str]] = frozenset(
        {"keep_latent", "optimizer", "gradient_checkpointing"}
    )
    method: Literal["llm_qat"] = "llm_qat"
    bits: Literal[2, 3, 4, 8] = 4
    group_size: GroupSize = 64
    symmetric: bool = False
    skip: tuple[str, ...] = ("lm_head",)
    activation_bits: Literal[4, 8, 16] = 16  # 16: activations are left alone
    kv_bits: Literal[4, 8, 16] = 16
    loss: Literal["cross_entropy", "self_distill"] = "cross_entropy"
    calibration: CalibrationSpec = CalibrationSpec()
    steps: AtLeastOne = 40
    epochs: Positive | None = None  # passes over the calibration chats, instead of `steps`
    batch_size: AtLeastOne = 32
    lr: Positive = 2e-4
    weight_decay: Weight = 0.0
    # Adam's 1e-8 lets a self-distillation control drift on float noise (DESIGN section 8, point 8).
    adam_eps: Positive = 1e-8
    # adamw8bit: moments of 8 bits (Dettmers et al. 2022), 2 bytes a weight instead of 8
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    gradient_checkpointing: bool = False  # less memory: activations are computed twice
    safety: SafetySpec | None = None  # None: plain LLM-QAT
    keep_latent: bool = False  # keep the latent weights, 4 bytes each, for `patch.start: latent`
    seed: int = 0


class GptqSpec(Spec):
    """GPTQ (Frantar et al. 2022), with llm-compressor's defaults."""

    method: Literal["gptq"] = "gptq"
    bits: Literal[2, 3, 4, 8] = 4
    group_size: GroupSize = 128
    symmetric: bool = True
    skip: tuple[str, ...] = ("lm_head",)
    # static: columns with large inputs first, groups as they lie. Groups in that order too
    # ("group", g_idx) are gone from llm-compressor 0.14, and transformers would misread them.
    act_order: Literal["none", "static"] = "static"
    damp: Positive = 0.01  # of the Hessian's mean diagonal
    block_size: AtLeastOne = 128  # columns between two updates of the rest
    calibration: LookedAt = CalibrationSpec(risk="I")
    sequences: AtLeastOne = 512
    max_length: AtLeastOne = 2048
    seed: int = 0


class AwqSpec(Spec):
    """AWQ (Lin et al. 2023), with its authors' 128 sequences of 512 tokens."""

    method: Literal["awq"] = "awq"
    bits: Literal[3, 4, 8] = 4
    group_size: GroupSize = 128
    symmetric: bool = False
    skip: tuple[str, ...] = ("lm_head",)
    duo_scaling: bool = True  # scales from weights and activations, not activations alone
    grid_points: Annotated[int, Field(ge=3)] = 20  # exponents tried per layer
    calibration: LookedAt = CalibrationSpec(risk="I")
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
    calibration: LookedAt = CalibrationSpec(risk="I")  # for static activations
    sequences: AtLeastOne = 512
    max_length: AtLeastOne = 2048
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
    calibration: LookedAt = CalibrationSpec(risk="I")
    sequences: AtLeastOne = 1024
    max_length: AtLeastOne = 2048
    batch_size: AtLeastOne = 16
    beam: AtLeastOne = 8  # hypotheses per group of the code search
    rounds: AtLeastOne = 20  # most turns of codes, codebooks and scales
    tolerance: Positive = 0.01  # a layer is done when a turn gains less than this share
    finetune_steps: Count = 100  # per block; 0: without fine-tuning
    finetune_lr: Positive = 1e-4
    seed: int = 0


def _base_by_default(data: Any, method: str, **settings: Any) -> Any:
    """Let `--set quantize.base.bits=8` alone keep the default method of a nested spec.

    With that method come the settings in which the default is not the method's own.
    """
    if isinstance(data, dict) and isinstance(data.get("base"), dict):
        given = data["base"]
        defaults = {} if "method" in given else {"method": method} | settings
        return data | {"base": defaults | given}
    return data


class QloraSpec(Spec):
    """LoRA fine-tuning above frozen low-bit weights (QLoRA)."""

    method: Literal["qlora"] = "qlora"
    # NF4 with double quantization, FP4, LLM.int8(), or integers by rtn, e.g. {method: rtn, bits: 4}
    base: Annotated[RtnSpec | BnbSpec, Field(discriminator="method")] = BnbSpec(double_quant=True)
    deploy: Literal["adapter", "merged"] = "merged"  # merged: rounded to `base`'s format again
    targets: tuple[str, ...] = ()  # last parts of layer names, e.g. q_proj; none: all of `base`
    # From here on the paper's, but for the rate.
    rank: AtLeastOne = 64
    alpha: Positive = 16.0
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    calibration: CalibrationSpec = CalibrationSpec()
    steps: AtLeastOne = 40
    epochs: Positive | None = None  # passes over the calibration chats, instead of `steps`
    batch_size: AtLeastOne = 16
    # The paper's 2e-4 for 7 B moves nothing in 40 steps of the embedded model; set it for such.
    lr: Positive = 5e-3
    weight_decay: Weight = 0.0
    adam_eps: Positive = 1e-8
    max_grad_norm: Positive = 0.3
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _default_base(cls, data: Any) -> Any:
        base = data.get("base") if isinstance(data, dict) else None
        double = isinstance(base, dict) and base.get("format") != "int8"
        return _base_by_default(data, "bnb", double_quant=double)


class CheckpointSpec(Spec):
    """A quantized checkpoint that exists already, of `model` (W); nothing is quantized."""

    method: Literal["checkpoint"] = "checkpoint"
    path: str  # a folder, a .gguf file, a hub id, or owner/name/file.gguf there
    revision: str | None = None


BaseSpec = Annotated[
    RtnSpec | BnbSpec | LlmQatSpec | QloraSpec | AqlmSpec | GptqSpec | AwqSpec | Fp8Spec,
    Field(discriminator="method"),
]


class Critical16Spec(Spec):
    """Most other methods, but the most safety-critical weights stay in 16 bits; no training."""

    method: Literal["critical16"] = "critical16"
    base: BaseSpec = RtnSpec()
    fraction: Fraction = 0.05  # of all quantized weights, by SNIP on W's refusals
    # weights: single ones; rows: of a layer, by mean score; blocks: tiles of one. qresafe alone
    # deploys these. layers: whole ones, for any server
    structure: Literal["weights", "rows", "blocks", "layers"] = "weights"
    block: tuple[AtLeastOne, AtLeastOne] | None = None  # rows and columns of a block
    harmful: AtLeastOne = 100  # prompts of the embedded pool that W answers
    path: str | None = None  # a file with a column prompt instead
    judge: str = "keyword"  # decides which answers are refusals
    max_new_tokens: AtLeastOne = 64
    batch_size: AtLeastOne = 32
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _default_base(cls, data: Any) -> Any:
        return _base_by_default(data, "rtn")

    @model_validator(mode="before")
    @classmethod
    def _default_block(cls, data: Any) -> Any:
        # 16 x 16 is what one instruction of a tensor core takes, and the least that PyTorch's
        # block-sparse kernels do; [1, n] would be one quantization group of a row.
        blocks = isinstance(data, dict) and data.get("structure") == "blocks"
        return data | {"block": data.get("block") or (16, 16)} if blocks else data

    @model_validator(mode="after")
    def _blocks_alone(self) -> Critical16Spec:
        if self.block and self.structure != "blocks":
            raise ValueError("block is of structure: blocks; leave it out")
        return self

    @model_validator(mode="after")
    def _one_overlay(self) -> Critical16Spec:
        if isinstance(self.base, QloraSpec) and self.base.deploy == "adapter":
            raise ValueError("16-bit weights under an adapter; use base.deploy: merged")
        if isinstance(self.base, AwqSpec):  # its weights are W's times scales that it folds away
            raise ValueError("AWQ rescales the weights that would be kept; use base.method: gptq")
        if isinstance(self.base, LlmQatSpec) and self.base.keep_latent:
            raise ValueError("latent weights are kept of llm_qat alone; leave out base.keep_latent")
        return self


QuantizeSpec = Annotated[BaseSpec | Critical16Spec | CheckpointSpec, Field(discriminator="method")]
