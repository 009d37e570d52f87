"""The frozen spec tree: the only home of every default.

YAML files and `--set patch.mask.tau=0.4` go through the same validation; an unknown key names its
nearest neighbours. The resolved spec is written into every stage's manifest.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from qresafe.judge_specs import JudgeSpec
from qresafe.quantize_specs import LlmQatSpec, QuantizeSpec
from qresafe.spec_base import (
    AtLeastOne,
    Axis,
    Count,
    Fraction,
    Kind,
    Positive,
    Weight,
)
from qresafe.spec_base import Spec as Spec


class ModelSpec(Spec):
    """A full-precision chat model W."""

    path: str = "embedded"  # "embedded", a local folder, or a Hugging Face hub id
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = False


class PromptSetSpec(Spec):
    """Prompts of one benchmark and axis."""

    benchmark: str = "embedded"  # `qresafe benchmarks` lists them
    # None: the benchmark's own (`prompts` and `embedded`: harmful).
    axis: Axis | None = None
    subset: str | None = None  # where a benchmark has parts, e.g. harmbench: contextual
    split: str = "test"
    path: str | None = None  # local file, `datasets` folder or hub id; None: the benchmark's hub id
    column: str | None = None  # the prompt column, where its name is unusual
    target_column: str | None = None
    category_column: str | None = None
    lang_column: str | None = None
    limit: AtLeastOne | None = None


class GenerateSpec(Spec):
    """How completions are generated; greedy when `temperature` is 0."""

    MAY_BE_EMPTY: ClassVar[frozenset[str]] = frozenset({"system_prompt"})
    engine: Literal["transformers", "vllm", "openai"] = "transformers"
    max_new_tokens: AtLeastOne = 64
    batch_size: AtLeastOne = 64
    temperature: Weight = 0.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Count = 0  # 0: no limit
    samples: AtLeastOne = 1  # completions per prompt; more than one needs a temperature
    seed: int = 0
    system_prompt: str | None = None
    endpoint: str | None = None  # base URL of an OpenAI-compatible server, for engine `openai`
    endpoint_model: str | None = None
    # For engine `openai`; requests in flight, and how long and how often each is tried.
    concurrency: AtLeastOne = 8
    timeout_seconds: Positive = 60.0
    retries: Count = 4

    @model_validator(mode="after")
    def _consistent(self) -> GenerateSpec:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples > 1 needs temperature > 0 (greedy samples are all equal)")
        if self.engine == "openai" and not self.endpoint:
            raise ValueError("engine 'openai' needs an endpoint, e.g. http://127.0.0.1:8000/v1")
        return self


class TeacherSpec(Spec):
    """Who gives the answers y_w instead of W: another model, or an OpenAI-compatible endpoint."""

    MAY_BE_EMPTY: ClassVar[frozenset[str]] = frozenset({"system_prompt"})
    model: ModelSpec | None = None
    endpoint: str | None = None  # base URL of a server, e.g. http://127.0.0.1:8000/v1
    endpoint_model: str | None = None
    system_prompt: str | None = None  # of the teacher alone; the patched model learns without it

    @model_validator(mode="after")
    def _one_of_both(self) -> TeacherSpec:
        if (self.model is None) == (self.endpoint is None):
            raise ValueError("give either a model or an endpoint, one of the two")
        return self


class PairsSpec(Spec):
    """The calibration pool: how many prompts of each kind W and Q0 answer."""

    LATER: ClassVar[frozenset[str]] = frozenset({"prefer"})
    teacher: TeacherSpec | None = None  # None: W itself
    # Kinds whose prompts become preferences (x, y_w, y_l); W's answers to the others are anchors.
    # The paper's pairs come of benign chats (UltraChat): [benign].
    prefer: Annotated[tuple[Kind, ...], Field(min_length=1)] = ("harmful",)
    harmful: Count = 300
    benign: Count = 300
    borderline: Count = 300
    recombined: Count = 800
    max_preferences: AtLeastOne = 300  # at most so many DPO pairs
    # Harmful prompts: where W refuses and Q0 does not, or where the answers differ, as of others.
    keep: Literal["flips", "different"] = "flips"
    judge: str = "keyword"  # decides what a flip is
    teacher_tokens: Count = 40  # store W's distribution on the first n tokens of its answer
    teacher_top_k: AtLeastOne = 64  # entries kept per token; the rest is one lumped bucket
    max_new_tokens: AtLeastOne = 64
    batch_size: AtLeastOne = 64  # rows per forward pass where answers are scored
    path: str | None = None  # a prompt file with columns prompt, axis instead of the embedded pool
    # Benchmarks instead, e.g. [{benchmark: ultrachat, limit: 500}]; their axis is the kind.
    prompts: tuple[PromptSetSpec, ...] = ()
    # A calibration prompt that is so similar to an evaluation prompt is dropped: Jaccard
    # similarity of character 5-grams; 1 drops equal texts alone.
    near_duplicate: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    seed: int = 0


class MaskSpec(Spec):
    """Which weights the patch may move (paper Eq. 3 and Algorithm 1)."""

    tau: Fraction = 0.3
    on: Literal["weight", "factors"] = "weight"
    scope: Literal["global", "layer"] = "global"
    # set_difference: SNIP of refusals, without the top `utility_tau` of SNIP of benign answers.
    score: Literal["snip", "set_difference", "random", "magnitude"] = "snip"
    utility_tau: Fraction = 0.1
    loss: Literal["nll", "dpo"] = "nll"  # L of Eq. 3: -log p(y_w|x), or the DPO loss
    # D_calib of Eq. 3: pairs where W refuses and Q0 complies, or prompts of every kind.
    rows: Literal["preferences", "all"] = "preferences"
    remask_every: Count = 50  # K of Algorithm 1; 0: mask once
    samples: AtLeastOne = 64

    @model_validator(mode="after")
    def _compare_preferences_only(self) -> MaskSpec:
        if self.loss == "dpo" and self.rows == "all":
            raise ValueError("loss: dpo compares two answers; set rows to preferences")
        return self


OBJECTIVE_PRESETS: dict[str, dict[str, float]] = {
    "default": {"dpo": 0.0, "nll": 0.0, "kl": 1.0, "anchor": 0.0},
    "paper": {"dpo": 1.0, "nll": 0.0, "kl": 0.0, "anchor": 0.0, "beta": 0.01},
    "sft": {"dpo": 0.0, "nll": 1.0, "kl": 0.0, "anchor": 1.0},
}


class ObjectiveSpec(Spec):
    """Weights of the named loss terms; a preset's name stands for its weights."""

    dpo: Weight = 0.0
    nll: Weight = 0.0
    kl: Weight = 1.0
    anchor: Weight = 0.0
    beta: Positive = 0.5
    # The first 8 tokens carry the refusal, but utility is lost in the later ones.
    kl_tokens: AtLeastOne = 40

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, data: Any) -> Any:
        if isinstance(data, str):
            if data not in OBJECTIVE_PRESETS:
                raise ValueError(
                    f"no objective preset {data!r}; use one of {list(OBJECTIVE_PRESETS)}"
                )
            return dict(OBJECTIVE_PRESETS[data])
        return data

    @model_validator(mode="after")
    def _something_to_learn(self) -> ObjectiveSpec:
        if not (self.dpo or self.nll or self.kl or self.anchor):
            raise ValueError("every objective weight is 0; give dpo, nll, kl or anchor a weight")
        return self


class ChangeSpec(Spec):
    """New values from a step on, as population-based training finds them."""

    at: AtLeastOne  # steps done before the change
    lr: Positive | None = None
    beta: Positive | None = None


class KindsSpec(Spec):
    """What the mean loss of each kind of calibration prompt weighs; 0 leaves the kind out."""

    harmful: Weight = 1.0
    benign: Weight = 3.0
    borderline: Weight = 1.0
    recombined: Weight = 1.0

    @model_validator(mode="after")
    def _something_to_learn(self) -> KindsSpec:
        if not any(self.model_dump().values()):
            raise ValueError("every kind has weight 0; give harmful, benign, ... a weight")
        return self


class FlipsSpec(Spec):
    """Greedy code flips (`patch.method: flips`): single codes go to a neighbour, nothing else."""

    max_flips: AtLeastOne = 800  # codes that may differ from Q0's
    rounds: AtLeastOne = 150  # of flipping, at most
    at_once: AtLeastOne = 50  # codes flipped in the first round, and the most in any
    at_least: AtLeastOne = 2  # fewer are not tried
    patience: Count = 12  # gradients in a row that may bring nothing
    rows: AtLeastOne = 160  # rows that a gradient is taken on, evenly over the kinds
    probe_rows: AtLeastOne = 192  # fixed rows on which the loss must fall
    kinds: KindsSpec = KindsSpec()
    remove: bool = True  # afterwards undo flips without which the loss does not rise


class PatchSpec(Spec):
    """The safety patch: masked LoRA on Q0's grid, code flips, or a usual repair to compare with."""

    LATER: ClassVar[frozenset[str]] = frozenset(
        {"start", "trains", "scale_lr", "updates", "gradient_checkpointing", "offload"}
    )
    # flips: single codes, without an adapter; of what is below it reads objective, flips,
    # micro_batch_size and seed. dpo, sft: TRL without a mask, rounded afterwards; no objective or
    # grid.
    method: Literal["masked_lora", "flips", "dpo", "sft"] = "masked_lora"
    # Of dpo and sft: a plain LoRA adapter, or every weight of the layers that Q0 quantized
    updates: Literal["lora", "full"] = "lora"
    objective: ObjectiveSpec = ObjectiveSpec()
    flips: FlipsSpec = FlipsSpec()
    mask: MaskSpec = MaskSpec()
    through_grid: bool = True  # straight-through rounding in the forward pass
    # latent: from the weights that Q0's were rounded from, where quantize.keep_latent has them
    start: Literal["checkpoint", "latent"] = "checkpoint"
    # scales: the grid's scales alone, no code, no mask and no factors; both: codes and scales
    trains: Literal["codes", "scales", "both"] = "codes"
    rank: AtLeastOne = 16
    alpha: Positive = 32.0
    lr: Positive = 5e-4
    scale_lr: Positive = 1e-2  # of a scale's relative change; warmed up and changed as lr is
    weight_decay: Weight = 0.0
    warmup_steps: Count = 5
    max_grad_norm: Positive = 1.0
    changes: tuple[ChangeSpec, ...] = ()  # of lr and objective.beta while training
    steps: AtLeastOne | None = 100  # None: `epochs` passes over the pairs
    epochs: Positive = 1.0
    batch_size: AtLeastOne = 56  # rows per optimizer step, over all workers
    micro_batch_size: AtLeastOne = 56  # rows per forward pass and worker
    gradient_checkpointing: bool = False  # less memory: activations are computed twice
    checkpoint_every: AtLeastOne = 20
    zero_stage: Literal[0, 1, 2, 3] = 2
    # What ZeRO keeps in host memory, slower: optimizer: AdamW's state and its step; parameters:
    # these, and this worker's shard of the weights
    offload: Literal["none", "optimizer", "parameters"] = "none"
    seed: int = 0

    @property
    def is_baseline(self) -> bool:
        """Whether TRL trains it, on one device and without a mask."""
        return self.method in ("dpo", "sft")

    @property
    def scores_by_gradient(self) -> bool:
        """Whether its masks are made of SNIP's scores."""
        masked = self.method == "masked_lora" and self.trains != "scales"
        return masked and self.mask.score in ("snip", "set_difference")

    @model_validator(mode="after")
    def _of_our_method(self) -> PatchSpec:
        if self.start == "latent" and self.method != "masked_lora":
            raise ValueError("start: latent is of method masked_lora; set start to checkpoint")
        if self.trains != "codes" and self.method != "masked_lora":
            raise ValueError("scales are trained by method masked_lora; set trains to codes")
        if self.updates == "full" and not self.is_baseline:
            raise ValueError("updates: full is of methods dpo and sft; set updates to lora")
        if self.trains != "codes" and not self.through_grid:
            raise ValueError("scales are trained through the grid; set through_grid to true")
        if self.trains == "scales" and self.start == "latent":
            raise ValueError("scales alone move no code; set start to checkpoint or trains to both")
        return self

    @model_validator(mode="after")
    def _sharded(self) -> PatchSpec:
        if self.offload != "none" and self.method != "masked_lora":
            raise ValueError("offload is of method masked_lora; set offload to none")
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("offload: optimizer is done by ZeRO; set zero_stage to 1, 2 or 3")
        if self.offload == "parameters" and self.zero_stage != 3:
            raise ValueError("offload: parameters is done by ZeRO-3; set zero_stage to 3")
        return self


class DecodingSpec(Spec):
    """One decoding configuration of an attack; a temperature of 0 is greedy."""

    temperature: Weight = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Count = 0  # 0: no limit


class AttackSpec(Spec):
    """Attacks on the harmful prompts: every system prompt x template x prefill x decoding."""

    MAY_BE_EMPTY: ClassVar[frozenset[str]] = frozenset({"prefills"})
    # huang: the 49 of Huang et al. 2023; paper: the six columns of the Q-resafe paper; or a list.
    decoding: Literal["huang", "paper"] | tuple[DecodingSpec, ...] = "huang"
    systems: Annotated[tuple[str, ...], Field(min_length=1)] = ("none",)  # vanilla, aoa, or a text
    prefills: Annotated[tuple[str, ...], Field(min_length=1)] = ("",)  # e.g. "Sure, here is"
    templates: str | None = None  # a file of jailbreaks with {prompt} where the prompt goes
    samples: AtLeastOne = 1  # draws of each
    max_new_tokens: AtLeastOne = 100
    batch_size: AtLeastOne = 32  # prompts that are read together, once for all configurations
    seed: int = 0


class EvaluateSpec(Spec):
    """What W, the control, Q0 and Q are measured on."""

    prompts: tuple[PromptSetSpec, ...] = (
        PromptSetSpec(axis="harmful"),
        PromptSetSpec(axis="benign"),
        PromptSetSpec(axis="borderline"),
    )
    judges: tuple[JudgeSpec, ...] = ("keyword", "refusal")
    generate: GenerateSpec = GenerateSpec()
    adapter: bool = True  # also measure the unrounded adapter
    attack: AttackSpec | None = None  # also attack W, Q0 and Q, e.g. `--set evaluate.attack={}`


class ResourcesSpec(Spec):
    """Where stages run; `workers: 0` runs everything in this process, without Ray."""

    workers: Count = 1  # training workers, and the most generation actors at a time
    # Where models answer, a worker spreads them over all its GPUs; training takes a GPU each.
    gpus_per_worker: Weight = 0.0
    cpus_per_worker: Positive = 1.0
    # Of `workers`, so many answer for W while the others answer for Q0; 0: all for one of them.
    teacher_workers: Count = 0
    address: str | None = None  # of a running Ray cluster; None: RAY_ADDRESS, else a local one
    wait_seconds: AtLeastOne = 300  # how long to wait for resources before giving up in words
    check_memory: bool = True  # refuse at the start what `qresafe plan` says cannot fit

    @model_validator(mode="after")
    def _whole_gpus(self) -> ResourcesSpec:
        if self.gpus_per_worker > 1 and not self.gpus_per_worker.is_integer():
            raise ValueError("gpus_per_worker above 1 must be a whole number")
        return self

    @model_validator(mode="after")
    def _some_for_both(self) -> ResourcesSpec:
        if self.teacher_workers and self.teacher_workers >= self.workers:
            raise ValueError("teacher_workers must be less than workers: Q0 needs some, too")
        return self

    @property
    def training(self) -> ResourcesSpec:
        """The same GPUs and CPUs among training workers, of which none has more than one GPU."""
        each = max(1, int(self.gpus_per_worker))
        shared = {"workers": self.workers * each, "gpus_per_worker": self.gpus_per_worker / each}
        return self.model_copy(update=shared | {"cpus_per_worker": self.cpus_per_worker / each})


class ExperimentSpec(Spec):
    """A whole experiment: W -> Q0 -> pairs -> patch -> export -> compare."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "demo"
    storage: str = "."  # local folder or fsspec URL; runs live under <storage>/runs/<name>
    model: ModelSpec = ModelSpec()
    quantize: QuantizeSpec = LlmQatSpec()
    control: bool = True  # the same fine-tuning in full precision, where the method fine-tunes
    pairs: PairsSpec = PairsSpec()
    patch: PatchSpec = PatchSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    resources: ResourcesSpec = ResourcesSpec()

    @model_validator(mode="before")
    @classmethod
    def _default_method(cls, data: Any) -> Any:
        # `--set quantize.bits=2` alone keeps the default method.
        if isinstance(data, dict) and isinstance(data.get("quantize"), dict):
            return data | {"quantize": {"method": LlmQatSpec().method} | data["quantize"]}
        return data

    @model_validator(mode="after")
    def _offload_by_workers(self) -> ExperimentSpec:
        if self.patch.offload != "none" and not self.resources.workers:
            raise ValueError("patch.offload is done by Ray workers; set resources.workers to 1")
        return self

    @property
    def has_adapter(self) -> bool:
        """Whether a patch before rounding is measured too: not if it is on a grid throughout."""
        on_grid = self.patch.method == "flips" or self.patch.trains == "scales"
        return self.evaluate.adapter and not on_grid
