"""The usual ways to repair a model, by TRL: DPO or SFT, of a LoRA adapter or of all weights."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qresafe.errors import DataError
from qresafe.progress import Progress, Silent
from qresafe.specs import PatchSpec

PairRow = Mapping[str, Any]  # of `records.PAIR`
Trained = tuple[Any, list[dict[str, float]]]


def dpo(
    model: Any,
    tokenizer: Any,
    rows: Sequence[PairRow],
    spec: PatchSpec,
    *,
    layers: Sequence[str],
    work: Path,
    progress: Progress | None = None,
) -> Trained:
    """Train by TRL's DPOTrainer on the preference rows: a LoRA adapter, merged, or all weights.

    Args:
        model: Q0 with decoded float weights; changed in place. It is its own reference.
        tokenizer: Its tokenizer.
        rows: Of pairs.parquet; only preference rows are used.
        spec: rank, alpha, beta, rate, warm-up, weight decay, batch sizes, steps and seed are the
            same as a patch's; `updates` is "lora" or "full".
        layers: Names of the linear layers to adapt, or to train whole: those that Q0 quantized.
        work: Folder for the trainer's files.
        progress: Advances by steps.

    Returns:
        The model with what was trained in its weights, and the trainer's log of each step, with
        its seconds. The start, and the pass over the reference, are in none of them.

    Raises:
        DataError: There is no preference row.
    """
    from trl import DPOConfig

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    data = [{name: row[name] for name in names} for row in rows if row["preference"]]
    arguments = DPOConfig(
        **trainer_arguments(spec, len(data), work),
        beta=spec.objective.beta,
        precompute_ref_log_probs=True,
        max_length=None,
    )
    return _train(dpo_trainer_class(), arguments, model, tokenizer, data, spec, layers, progress)


def sft(
    model: Any,
    tokenizer: Any,
    rows: Sequence[PairRow],
    spec: PatchSpec,
    *,
    layers: Sequence[str],
    work: Path,
    progress: Progress | None = None,
) -> Trained:
    """Train by TRL's SFTTrainer on W's answers of all rows: an adapter, merged, or all weights.

    Arguments, result and errors are those of `dpo`; the loss is on answer tokens only.
    """
    from trl import SFTConfig, SFTTrainer

    data = [
        {
            "input_ids": [*row["prompt_ids"], *row["chosen_ids"]],
            "labels": [-100] * len(row["prompt_ids"]) + list(row["chosen_ids"]),
        }
        for row in rows
    ]
    arguments = SFTConfig(**trainer_arguments(spec, len(data), work), max_length=None)
    return _train(SFTTrainer, arguments, model, tokenizer, data, spec, layers, progress)


def dpo_trainer_class() -> Any:
    """Return TRL's DPOTrainer for rows that are tokenized already.

    Tokenizing the texts again could give other ids than the models generated.
    """
    from trl import DPOTrainer

    class TokenizedDPOTrainer(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    return TokenizedDPOTrainer


def lora_config(spec: PatchSpec, layers: Sequence[str]) -> Any:
    """Return PEFT's configuration of an adapter as large as a patch's."""
    from peft import LoraConfig

    return LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, target_modules=list(layers), lora_dropout=0.0
    )


def _train(
    trainer: Any,
    arguments: Any,
    model: Any,
    tokenizer: Any,
    data: list[dict[str, Any]],
    spec: PatchSpec,
    layers: Sequence[str],
    progress: Progress | None,
) -> Trained:
    from datasets import Dataset
    from transformers import PrinterCallback

    if not data:
        raise DataError("no row to train the baseline on", remedy="add calibration prompts")
    whole = spec.updates == "full"
    if whole:
        _free_only(model, layers)
    stopwatch = _stopwatch(progress or Silent())
    trained = trainer(
        model=model,
        args=on_one_device(arguments),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        peft_config=None if whole else lora_config(spec, layers),
        callbacks=[stopwatch],
    )
    trained.remove_callback(PrinterCallback)  # the log is returned, not printed
    trained.train()
    steps = [entry for entry in trained.state.log_history if "loss" in entry]
    log = [entry | {"seconds": s} for entry, s in zip(steps, stopwatch.seconds, strict=True)]
    made = trained.model if whole else trained.model.merge_and_unload()
    return made.eval(), log


def _free_only(model: Any, layers: Sequence[str]) -> None:
    """Let the weights of some layers be trained and nothing else: only they have codes."""
    model.requires_grad_(False)
    for name in layers:
        model.get_submodule(name).weight.requires_grad_(True)


def _stopwatch(progress: Progress) -> Any:
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):  # type: ignore[misc]
        """Takes the seconds of every step, and shows it."""

        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.began)
            progress.advance()

    return Stopwatch()


def on_one_device(arguments: Any) -> Any:
    """Let a trainer use one GPU where it sees several: TRL refuses to wrap a model for them."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def trainer_arguments(spec: PatchSpec, rows: int, work: Path) -> dict[str, Any]:
    """Return transformers' training arguments that mean the same as a patch's spec.

    A step's rows go through the model in equal parts, of `micro_batch_size` or fewer.
    """
    import torch

    batch = max(1, min(spec.batch_size, rows))
    fitting = range(1, min(spec.micro_batch_size, batch) + 1)
    micro = max(size for size in fitting if batch % size == 0)
    return {
        "output_dir": str(work),
        "max_steps": spec.steps or -1,
        "num_train_epochs": spec.epochs,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": batch // micro,
        "learning_rate": spec.lr,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": spec.warmup_steps,
        "weight_decay": spec.weight_decay,
        "max_grad_norm": spec.max_grad_norm,
        "gradient_checkpointing": spec.gradient_checkpointing,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "seed": spec.seed,
        "save_strategy": "no",
        "logging_strategy": "steps",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }
