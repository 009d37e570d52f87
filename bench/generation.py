"""Generation against transformers' own pipeline, and what Ray Data adds to a long job.

Both sides complete the same prompts of 16 to 256 tokens, given to both in the same random order,
with the same batch size, limit and end token, greedily, in this process and with the same
threads. They take turns; the best of the repetitions counts, in CPU time where there is no GPU, so
that other work on the machine does not. There are six batches of prompts: with a single one,
planning by length could not help. Two cases: answers end by themselves at mixed lengths, as a chat
model's do, or every answer runs to the limit. Only tokens up to the end token count.

    python -m bench.generation                    # a Llama with 30 M parameters
    python -m bench.generation --only ray         # what Ray adds to a job of about 60 s
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.clock import kind, now

VOCABULARY = 8192
END = 2


@dataclass(frozen=True)
class Shape:
    """A randomly initialised Llama; the defaults have 29.5 M parameters."""

    hidden: int = 512
    layers: int = 8
    heads: int = 8
    feed_forward: int = 1376


@dataclass(frozen=True)
class Load:
    """What is generated."""

    prompts: int = 192
    shortest: int = 16
    longest: int = 256
    new_tokens: int = 64
    batch_size: int = 32
    repeat: int = 2
    threads: int = 1


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["pipeline", "ray"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=int, default=Load.prompts)
    parser.add_argument("--repeat", type=int, default=Load.repeat)
    parser.add_argument("--threads", type=int, default=Load.threads)
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the job on Ray")
    args = parser.parse_args()
    load = Load(prompts=args.prompts, repeat=args.repeat, threads=args.threads)
    result: dict[str, Any] = {}
    if args.only != "ray":
        result["pipeline"] = against_pipeline(Shape(), load, args.device)
    if args.only != "pipeline":
        result["ray"] = ray_overhead(Shape(), load, args.seconds)
    print(json.dumps(result, indent=1))


def against_pipeline(shape: Shape, load: Load, device: str = "cpu") -> dict[str, Any]:
    """Return tokens/s of both and their ratio, for both kinds of answers.

    Args:
        shape: The model's.
        load: What to generate.
        device: A torch device.
    """
    import torch

    from qresafe.stages.runtime import cpu_threads

    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    texts = random_prompts(load)
    result: dict[str, Any] = {}
    with cpu_threads(load.threads):
        for name, ends_after in (("mixed", load.new_tokens / 2), ("to the limit", 0.0)):
            model = random_llama(shape, ends_after).to(device)
            sides = {
                "ours": lambda model=model: ours(model, tokenizer, texts, load),
                "pipeline": lambda model=model: pipeline(model, tokenizer, texts, load),
            }
            result[name] = compare(sides, load.repeat)
            result["parameters"] = sum(p.numel() for p in model.parameters())
    return result


def compare(sides: dict[str, Callable[[], list[list[int]]]], repeat: int) -> dict[str, Any]:
    """Let both sides take turns; return tokens/s, the ratio, and how many answers agree."""
    best = dict.fromkeys(sides, float("inf"))
    answers: dict[str, list[list[int]]] = {}
    for _ in range(repeat):
        for name, side in sides.items():
            began = now()
            answers[name] = side()
            best[name] = min(best[name], now() - began)
    tokens = {name: sum(map(len, rows)) for name, rows in answers.items()}
    speed = {name: tokens[name] / best[name] for name in sides}
    pairs = list(zip(*answers.values(), strict=True))
    return {
        "tokens_per_second": {name: round(value, 1) for name, value in speed.items()},
        "ratio": round(speed["ours"] / speed["pipeline"], 3),
        "clock": kind(),
        "tokens": tokens,
        "equal_answers": f"{sum(a == b for a, b in pairs)} of {len(pairs)}",
    }


def ours(model: Any, tokenizer: Any, texts: list[str], load: Load) -> list[list[int]]:
    """Complete all texts by `generate_batch`, in planned batches."""
    from qresafe.hf.batching import length_plan
    from qresafe.hf.generate import generate_batch
    from qresafe.specs import GenerateSpec

    spec = GenerateSpec(max_new_tokens=load.new_tokens)
    ids = [tokenizer.encode(text) for text in texts]
    answers: list[list[int]] = [[] for _ in texts]
    for rows in length_plan([len(row) for row in ids], load.batch_size):
        keys = [str(row) for row in rows]
        made = generate_batch(model, tokenizer, [ids[row] for row in rows], keys, spec)
        for row, generated in zip(rows, made, strict=True):
            answers[row] = generated.ids
    return answers


def pipeline(model: Any, tokenizer: Any, texts: list[str], load: Load) -> list[list[int]]:
    """Complete all texts by transformers' text-generation pipeline."""
    import transformers

    transformers.logging.set_verbosity_error()
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"batch_size": load.batch_size, "do_sample": False, "return_tensors": True}
    made = pipe(texts, max_new_tokens=load.new_tokens, **options)
    lengths = [len(text.split()) for text in texts]
    answers = []
    for place, (row,) in enumerate(made):  # rows come with the left padding of their batch
        first = place // load.batch_size * load.batch_size
        width = max(lengths[first : first + load.batch_size])
        answers.append(until_end([int(token) for token in row["generated_token_ids"][width:]]))
    return answers


def until_end(tokens: list[int]) -> list[int]:
    """Return the tokens up to the end token: what comes after is padding."""
    return tokens[: tokens.index(END) + 1] if END in tokens else tokens


def ray_overhead(shape: Shape, load: Load, seconds: float) -> dict[str, Any]:
    """Return the wall time of one job in this process and on Ray Data with one actor.

    Both run the whole generate stage with the same threads. The session's start is timed apart:
    an experiment pays it once.
    """
    from qresafe.dist.runtime import make_runtime
    from qresafe.specs import ResourcesSpec

    with tempfile.TemporaryDirectory() as folder:
        model = save_model(shape, Path(folder) / "model")
        prompts = job_size(model, load, seconds)
        local = make_runtime(ResourcesSpec(workers=0, cpus_per_worker=load.threads))
        began = time.perf_counter()
        cluster = make_runtime(ResourcesSpec(workers=1, cpus_per_worker=load.threads))
        session = time.perf_counter() - began
        times = {
            name: stage_seconds(Path(folder) / name, model, load, prompts, runtime)
            for name, runtime in (("in_process", local), ("ray", cluster))
        }
        cluster.close()  # type: ignore[attr-defined]
    return {
        "seconds": {name: round(value, 2) for name, value in times.items()},
        "ratio": round(times["ray"] / times["in_process"], 3),
        "session_seconds": round(session, 2),
        "prompts": prompts,
    }


def job_size(model: Path, load: Load, seconds: float) -> int:
    """Return how many prompts keep this process busy for about `seconds`."""
    from qresafe.dist.runtime import make_runtime
    from qresafe.specs import ResourcesSpec

    local = make_runtime(ResourcesSpec(workers=0, cpus_per_worker=load.threads))
    with tempfile.TemporaryDirectory() as folder:
        few = 2 * load.batch_size
        stage_seconds(Path(folder) / "warm", model, load, load.batch_size, local)
        spent = stage_seconds(Path(folder) / "try", model, load, few, local)
    batches = max(2, round(seconds / spent * 2))
    return batches * load.batch_size


def stage_seconds(storage: Path, model: Path, load: Load, prompts: int, runtime: Any) -> float:
    """Return the wall time of the generate stage over so many prompts."""
    import pyarrow as pa

    from qresafe.artifacts import Run
    from qresafe.hf.models import resolve
    from qresafe.hf.warm import ModelInput
    from qresafe.progress import Silent
    from qresafe.records import PROMPT
    from qresafe.specs import GenerateSpec, ModelSpec
    from qresafe.stages.generate import generate

    texts = random_prompts(load, prompts)
    rows = [{"prompt_id": str(i), "axis": "benign", "prompt": t} for i, t in enumerate(texts)]
    source = ModelInput.of(resolve(ModelSpec(path=str(model))))
    began = time.perf_counter()
    generate(
        Run(str(storage), "bench"),
        label="bench",
        model=source,
        prompts=pa.Table.from_pylist(rows, schema=PROMPT),
        spec=GenerateSpec(max_new_tokens=load.new_tokens, batch_size=load.batch_size),
        runtime=runtime,
        progress=Silent(),
    )
    return time.perf_counter() - began


def random_prompts(load: Load, count: int | None = None) -> list[str]:
    """Return texts of evenly mixed lengths, in random order, the same in every run."""
    import random

    draw = random.Random(0)
    lengths = [draw.randint(load.shortest, load.longest) for _ in range(count or load.prompts)]
    return [" ".join(f"w{draw.randint(8, VOCABULARY - 1)}" for _ in range(n)) for n in lengths]


def word_tokenizer(vocabulary: int = VOCABULARY) -> Any:
    """Return a tokenizer with one token per word, so that lengths are what they seem."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, vocabulary))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.padding_side = "left"
    template = "{% for m in messages %}{{ m['content'] }} </s> {% endfor %}"
    tokenizer.chat_template = template
    return tokenizer


def random_llama(shape: Shape, ends_after: float) -> Any:
    """Return a random Llama whose answers end after about so many tokens (0: never)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=1024,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=END,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        # A random token wins about every VOCABULARY-th step; a longer row wins more often.
        row = model.lm_head.weight[END]
        row.mul_(_row_scale(ends_after) if ends_after else 0.0)
    return model


def _row_scale(ends_after: float) -> float:
    """Return the scale s at which N(0, s) exceeds the largest of VOCABULARY N(0, 1) so often.

    P(N(0, s) > m) = 1/ends_after with m the median of that largest, so s = m / z(1/ends_after).
    """
    from scipy.stats import norm

    largest = norm.ppf(0.5 ** (1 / VOCABULARY))
    return float(largest / norm.isf(1 / ends_after))


def save_model(shape: Shape, folder: Path) -> Path:
    """Save a random Llama and its tokenizer where the generate stage can load them."""
    random_llama(shape, 0.0).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
