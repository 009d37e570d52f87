"""The patch step against TRL's DPOTrainer with a PEFT LoRA adapter, tokens per second.

Both train the same randomly initialised Llama on the same preference pairs (prompt and answer of
64 to 256 tokens together), with the same batch, rank, precision and AdamW, in one process, with
reference log-probs computed beforehand. They take turns, step by step, and a step's median
counts. On a CPU the clock is the process's own CPU time, so that other work on the machine does
not count; on a GPU it is the wall clock, synchronised. A third step of ours has no mask: what the
mask itself costs or saves.

    python -m bench.patch_step
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from bench.clock import kind, now
from qresafe import records
from qresafe.core.grids import QuantizedTensor, fit_uniform
from qresafe.hf import baselines
from qresafe.specs import PatchSpec
from qresafe.stages.patch_data import Pool, batch_at
from qresafe.stages.patch_loop import PatchInputs, PatchLoop
from qresafe.stages.train_engine import LocalEngine

VOCABULARY = 8192
TARGETS = {"factors": 1.2, "weight": 0.7}  # ratio to TRL + PEFT
UNMASKED = "weight, no mask"


def llama(hidden: int = 512, layers: int = 8, seed: int = 0) -> Any:
    """Return a random Llama; the defaults have 33 million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 64),
        max_position_embeddings=512,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def quantize(model: Any) -> dict[str, QuantizedTensor]:
    """Round all linear layers but the head to INT4, groups of 64; return grids and codes."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            grid = fit_uniform(module.weight.detach(), 4, 64, False)
            found[name] = QuantizedTensor(grid, grid.encode(module.weight.detach()))
            module.weight.data = found[name].dense()
    return found


def preference_pairs(count: int, low: int = 64, high: int = 256, seed: int = 0) -> pa.Table:
    """Return random pairs: prompt and answer have `low` to `high` tokens, half of each or so."""
    draw = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        total = int(draw.integers(low, high + 1))
        prompt = int(total * draw.uniform(0.3, 0.7))
        lengths = {
            "prompt_ids": prompt,
            "chosen_ids": total - prompt,
            "rejected_ids": int(draw.integers(low, high + 1)) - prompt,
        }
        ids = {k: draw.integers(3, VOCABULARY, max(n, 8)).tolist() for k, n in lengths.items()}
        given = {"prompt_id": f"p{index}", "kind": "harmful", "preference": True}
        texts = {"prompt": "x", "chosen": "w", "rejected": "l"}
        rows.append(dict.fromkeys(records.PAIR.names) | given | texts | ids)
    return pa.Table.from_pylist(rows, records.PAIR)


def tokens_of(rows: list[dict[str, Any]]) -> int:
    """Return the tokens of all sequences, prompts counted once per answer, without padding."""
    return sum(
        2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
        for row in rows
    )


def our_step(
    on: str,
    through_grid: bool,
    spec: PatchSpec,
    table: pa.Table,
    tau: float = 0.6,
    **shape: int,
) -> Any:
    """Return a function that does one optimizer step of the patch."""
    mask = {"on": on, "tau": tau, "score": "magnitude", "remask_every": 0}
    changes = {"mask": spec.mask.model_validate(mask), "through_grid": through_grid}
    mine = spec.model_copy(update=changes)
    model = llama(**shape)
    quantized = quantize(model)
    count = table.num_rows
    columns = [table["prompt_id"], pa.array([-900.0] * count), pa.array([-900.0] * count)]
    reference = pa.table(columns, schema=records.REFERENCE_LOGPS)
    pool = Pool(table, reference, mine.objective)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loop = PatchLoop(LocalEngine(device), PatchInputs(model, quantized, pool), mine)
    return lambda step: loop.advance()


def trl_step(spec: PatchSpec, table: pa.Table, work: Path, **shape: int) -> Any:
    """Return a function that does one optimizer step of TRL's DPOTrainer with PEFT LoRA."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_bare_tokenizer(), pad_token="<pad>", eos_token="</s>"
    )
    model = llama(**shape)
    layers = list(quantize(model))
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    given = {"ref_chosen_logps": -900.0, "ref_rejected_logps": -900.0}
    rows = [{k: row[k] for k in names} | given for row in table.to_pylist()]
    arguments = DPOConfig(
        **baselines.trainer_arguments(spec, len(rows), work),
        beta=spec.objective.beta,
        max_length=None,
    )
    trainer = baselines.dpo_trainer_class()(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=baselines.lora_config(spec, layers),
    )
    trainer.precompute_ref_logps = True  # they are in the rows
    factors = [p for p in trainer.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=spec.lr)
    trainer.model.train()

    def step(number: int) -> None:
        places = batch_at(len(rows), spec.batch_size, spec.seed, number)
        inputs = trainer.data_collator([rows[place] for place in places])
        inputs = {k: v.to(trainer.model.device) for k, v in inputs.items()}
        trainer.compute_loss(trainer.model, inputs).backward()
        nn.utils.clip_grad_norm_(factors, spec.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(steps: int = 6, rows: int = 8, rank: int = 16, **shape: int) -> dict[str, Any]:
    """Time both mask kinds and TRL on the same batches, in turns; return tokens/s and ratios."""
    table = preference_pairs(rows * (steps + 1))
    spec = PatchSpec.model_validate(
        {
            "objective": {"dpo": 1.0, "kl": 0.0, "beta": 0.1},
            "rank": rank,
            "alpha": 2.0 * rank,
            "batch_size": rows,
            "micro_batch_size": rows,
            "steps": steps + 1,
        }
    )
    with tempfile.TemporaryDirectory() as work:
        contestants: dict[str, Callable[[int], Any]] = {
            "trl": trl_step(spec, table, Path(work), **shape),
            "factors": our_step("factors", False, spec, table, **shape),
            "weight": our_step("weight", True, spec, table, **shape),
            UNMASKED: our_step("weight", True, spec, table, tau=1.0, **shape),
        }
        seconds = _in_turns(contestants, steps)
    listed = table.to_pylist()
    batches = [batch_at(len(listed), rows, spec.seed, step) for step in range(1, steps + 1)]
    tokens = tokens_of([listed[place] for places in batches for place in places])
    speed = {name: tokens / sum(times) for name, times in seconds.items()}
    return {
        "parameters": sum(p.numel() for p in llama(**shape).parameters()),
        "rows_per_step": rows,
        "threads": torch.get_num_threads(),
        "clock": kind(),
        "tokens_per_second": {name: round(value, 1) for name, value in speed.items()},
        "ratio": {name: round(speed[name] / speed["trl"], 3) for name in TARGETS},
        "masked_to_unmasked": round(speed["weight"] / speed[UNMASKED], 3),
        "median_seconds": {k: round(statistics.median(v), 4) for k, v in seconds.items()},
        "target": TARGETS,
    }


def _in_turns(contestants: dict[str, Callable[[int], Any]], steps: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for step in contestants.values():
        step(0)  # warm-up: allocations, and our first masks
    for number in range(1, steps + 1):
        for name, step in contestants.items():
            began = now()
            step(number)
            seconds[name].append(now() - began)
    return seconds


def _bare_tokenizer() -> Any:
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rows", type=int, default=8, help="pairs per optimizer step")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(measure(options.steps, options.rows), indent=1))


if __name__ == "__main__":
    main()
