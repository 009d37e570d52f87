"""One case of `bench.plan` in a process of its own: run a real stage, print its peak memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.profiler import ProfilerActivity, profile

from qresafe import records
from qresafe.core.grids import QuantizedTensor, fit_uniform
from qresafe.specs import PatchSpec

PROMPT = 48


def llama(shape: dict[str, int], dtype: torch.dtype, device: str) -> Any:
    """Return a random Llama of a shape of `bench.plan`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape, max_position_embeddings=2048, pad_token_id=0)
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(device=device, dtype=dtype).eval()


def quantized(model: Any, group_size: int) -> dict[str, QuantizedTensor]:
    """Round all linear layers but the head to INT4 in place; return their grids and codes."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            grid = fit_uniform(module.weight.detach(), 4, group_size, False)
            found[name] = QuantizedTensor(grid, grid.encode(module.weight.detach()))
            module.weight.data = found[name].dense()
    return found


def pairs(rows: int, answer: int, vocabulary: int, top_k: int) -> pa.Table:
    """Return preference pairs of one length, with a teacher's distribution on the answers."""
    draw = np.random.default_rng(0)
    ids = {"prompt_ids": PROMPT, "chosen_ids": answer, "rejected_ids": answer}
    made = []
    for index in range(rows):
        row = dict.fromkeys(records.PAIR.names) | {"prompt_id": f"p{index}", "kind": "harmful"}
        row |= {"preference": True, "prompt": "x", "chosen": "w", "rejected": "l"}
        row |= {name: draw.integers(3, vocabulary, count).tolist() for name, count in ids.items()}
        row["teacher_top_k"] = top_k
        row["teacher_ids"] = np.tile(np.arange(top_k), answer).tolist()
        row["teacher_logps"] = [-5.0] * (top_k * answer)
        made.append(row)
    return pa.Table.from_pylist(made, records.PAIR)


def patch_step(case: dict[str, Any], device: str) -> Callable[[], None]:
    """Return what takes the patch loop through its first steps, with two re-maskings."""
    from qresafe.stages.flip_loop import FlipLoop
    from qresafe.stages.patch_data import Pool
    from qresafe.stages.patch_loop import PatchInputs, PatchLoop
    from qresafe.stages.train_engine import LocalEngine

    spec = PatchSpec.model_validate(case["patch"])
    model = llama(case["shape"], getattr(torch, case["dtype"]), device)
    layers = quantized(model, case["group_size"])
    table = pairs(spec.batch_size, case["answer"], case["shape"]["vocab_size"], 16)
    given = [table["prompt_id"], *2 * [pa.array([-900.0] * len(table))]]
    reference = pa.table(given, schema=records.REFERENCE_LOGPS)
    pool = Pool(table, reference, spec.objective)
    kind = FlipLoop if spec.method == "flips" else PatchLoop
    loop = kind(LocalEngine(device), PatchInputs(model, layers, pool), spec)
    del model, layers

    def run() -> None:
        for _ in range(2):
            loop.advance()

    return run


def generation(case: dict[str, Any], device: str) -> Callable[[], None]:
    """Return what answers a batch of prompts."""
    from qresafe.embedded.build import embedded_model_path
    from qresafe.hf.generate import generate_batch
    from qresafe.hf.models import load_tokenizer
    from qresafe.specs import GenerateSpec

    model = llama(case["shape"], getattr(torch, case["dtype"]), device)
    model.generation_config.eos_token_id = None
    prompts = [[5] * PROMPT] * case["rows"]
    spec = GenerateSpec(max_new_tokens=case["answer"])

    # Of the embedded model: only how answers end and become text is asked of it.
    tokenizer = load_tokenizer(embedded_model_path())
    keys = [str(index) for index in range(len(prompts))]
    return lambda: generate_batch(model, tokenizer, prompts, keys, spec)


def training(case: dict[str, Any], device: str) -> Callable[[], None]:
    """Return what takes LLM-QAT, or its control, through two steps."""
    from qresafe.hf.finetune import finetune
    from qresafe.hf.recompute import recompute_blocks
    from qresafe.hf.writing import Scheme
    from qresafe.quantizers.llm_qat import FittedRounding

    model = llama(case["shape"], torch.float32, device).requires_grad_(False)
    names = [
        n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"
    ]
    latents = [model.get_submodule(name).weight.requires_grad_() for name in names]
    if case["rounded"]:
        scheme = Scheme(4, case["group_size"], False, 16, 16)
        for name in names:
            torch.nn.utils.parametrize.register_parametrization(
                model.get_submodule(name), "weight", FittedRounding(scheme, torch.float32)
            )
    if case["recompute"]:
        recompute_blocks(model, random=True)
    chats = [([5] * PROMPT, [7] * case["answer"])] * case["rows"]
    return lambda: finetune(
        model,
        chats,
        parameters=latents,
        steps=2,
        batch_size=len(chats),
        lr=1e-4,
        optimizer=case["optimizer"],
    )


STAGES = {"patch": patch_step, "generate": generation, "llm_qat": training}


def held() -> int:
    """Return the bytes of all tensors that live in this process, each storage once."""
    import gc

    gc.collect()
    sizes = {
        thing.untyped_storage().data_ptr(): thing.untyped_storage().nbytes()
        for thing in gc.get_objects()
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu"
    }
    return sum(sizes.values())


def allocator_peak(run: Callable[[], None]) -> int:
    """Return the most bytes that torch's CPU allocator gave out above the start, while running."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def peak_of(case: dict[str, Any], device: str) -> int:
    """Return the most bytes that torch held for a case at a time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, more would wait for each other
    try:
        return _peak(case, device)
    finally:
        torch.set_num_threads(threads)


def _peak(case: dict[str, Any], device: str) -> int:
    before = held()
    run = STAGES[case["stage"]](case, device)
    if device == "cpu":
        return held() - before + allocator_peak(run)
    torch.cuda.reset_peak_memory_stats()
    run()
    return int(torch.cuda.max_memory_allocated())


def main() -> None:
    print(json.dumps({"peak": peak_of(json.loads(sys.argv[1]), sys.argv[2])}))


if __name__ == "__main__":
    main()
