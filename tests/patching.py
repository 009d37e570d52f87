"""Tiny inputs of the patch loop, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from upath import UPath

from qresafe import records
from qresafe.artifacts import Artifact, Run
from qresafe.core.grids import QuantizedTensor, fit_uniform
from qresafe.core.scales import rescaled, scale_of
from qresafe.hf.checkpoint import QuantizedCheckpoint
from qresafe.specs import PatchSpec
from qresafe.stages.patch_data import Pool
from qresafe.stages.patch_loop import PatchInputs
from qresafe.stages.runtime import write_table

VOCABULARY = 64
FLIPS: dict[str, Any] = {
    "max_flips": 60,
    "rounds": 8,
    "at_once": 16,
    "at_least": 2,
    "patience": 1,
    "rows": 6,
    "probe_rows": 9,
    "kinds": {"harmful": 1.0, "benign": 2.0, "borderline": 1.0, "recombined": 0.5},
}


def tiny_model(seed: int = 0) -> Any:
    """Return a two-layer Llama (hidden 32) with weights far from zero."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def quantize_in_place(model: Any, bits: int = 4) -> dict[str, QuantizedTensor]:
    """Round every linear layer but the head to an asymmetric grid; return grids and codes."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            grid = fit_uniform(module.weight.detach(), bits, 16, False)
            found[name] = QuantizedTensor(grid, grid.encode(module.weight.detach()))
            module.weight.data = found[name].dense()
    return found


def random_pairs(preferences: int = 6, anchors: int = 8, seed: int = 0) -> pa.Table:
    """Return `records.PAIR` rows of random tokens, of unequal lengths, with a teacher's top 5."""
    draw = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> list[int]:
        return draw.integers(1, VOCABULARY, draw.integers(low, high)).tolist()

    rows = []
    for index in range(preferences + anchors):
        kind = "harmful" if index < preferences else ("benign", "recombined")[index % 2]
        chosen = tokens(3, 12)
        count = min(4, len(chosen))
        logits = torch.from_numpy(draw.normal(size=(count, VOCABULARY)) * 2).float()
        top = logits.log_softmax(-1).topk(5)
        rows.append(
            {
                "prompt_id": f"p{index}",
                "kind": kind,
                "prompt": f"prompt {index}",
                "chosen": "w",
                "rejected": "l",
                "preference": kind == "harmful",
                "prompt_ids": tokens(4, 20),
                "chosen_ids": chosen,
                "rejected_ids": tokens(3, 12),
                "teacher_top_k": 5,
                "teacher_ids": top.indices.flatten().tolist(),
                "teacher_logps": top.values.flatten().tolist(),
            }
        )
    return pa.Table.from_pylist(rows, records.PAIR)


def reference_of(pairs: pa.Table, chosen: float = -20.0, rejected: float = -22.0) -> pa.Table:
    """Return made-up reference log-probs of all rows."""
    count = pairs.num_rows
    columns = [pairs["prompt_id"], pa.array([chosen] * count), pa.array([rejected] * count)]
    return pa.table(columns, schema=records.REFERENCE_LOGPS)


def patch_spec(**changes: Any) -> PatchSpec:
    """Return a small spec in which every term has a weight; `changes` override its keys."""
    base = {
        "objective": {"dpo": 1.0, "nll": 0.5, "kl": 1.0, "anchor": 0.3, "kl_tokens": 3},
        "mask": {"tau": 0.5, "remask_every": 3, "samples": 4},
        "rank": 2,
        "lr": 1e-2,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "steps": 8,
        "batch_size": 6,
        "micro_batch_size": 4,
        "checkpoint_every": 3,
    }
    return PatchSpec.model_validate(base | changes)


def flip_spec(**changes: Any) -> PatchSpec:
    """Return a small spec of `method: flips`; `changes` override its keys of `flips`."""
    objective = {"nll": 1.0, "kl": 0.5, "anchor": 0.3, "kl_tokens": 3}
    spec = {"method": "flips", "objective": objective, "flips": FLIPS | changes}
    return patch_spec(**spec)


def patch_inputs(spec: PatchSpec, seed: int = 0) -> PatchInputs:
    """Return a fresh tiny Q0 and its pool of rows."""
    model = tiny_model(seed)
    quantized = quantize_in_place(model)
    pairs = random_pairs(seed=seed)
    return PatchInputs(model, quantized, Pool(pairs, reference_of(pairs), spec.objective))


def made_pairs(run: Run, preferences: int = 4) -> Artifact:
    """Return a finished `pairs` stage of random tokens: preferences and four anchors."""
    draw = np.random.default_rng(0)
    rows = []
    for index in range(preferences + 4):
        rows.append(
            dict.fromkeys(records.PAIR.names)
            | {
                "prompt_id": f"p{index}",
                "kind": "harmful" if index < preferences else "benign",
                "prompt": "x",
                "chosen": "w",
                "rejected": "l",
                "preference": index < preferences,
                "prompt_ids": draw.integers(6, 200, 5 + index).tolist(),
                "chosen_ids": draw.integers(6, 200, 7).tolist(),
                "rejected_ids": draw.integers(6, 200, 4 + index).tolist(),
            }
        )
    table = pa.Table.from_pylist(rows, records.PAIR)

    def work(folder: UPath) -> dict[str, Any]:
        write_table(folder / "pairs.parquet", table)
        return {}

    return run.stage("pairs", spec={"n": preferences}, inputs={}, code_version=1, work=work)


def move_codes_and_scales(q0: QuantizedCheckpoint, target: Path) -> Path:
    """Rewrite every other layer of a checkpoint: a few codes, and all scales by a few per cent."""
    codes, scales = {}, {}
    draw = torch.Generator().manual_seed(0)
    for name in q0.names[::2]:
        tensor = q0.read(name)
        change = torch.randn(scale_of(tensor.grid).shape, generator=draw) * 0.05
        scales[name] = scale_of(rescaled(tensor.grid, change))
        codes[name] = tensor.codes.clone()
        codes[name].view(-1)[::50] = codes[name].view(-1)[1]
    return q0.rewrite(target, codes, scales=scales)
