"""An attack's many continuations of the same prompts: prompts read once, or read for each.

Both sides draw the same 49 x prompts completions of a random Llama in this process with the same
batches and noise, and their tokens are compared; the two take turns, and the best of the
repetitions counts. `--prompt` is the prompts' length: 30 tokens are a bare question, 400 one in a
jailbreak template.

    python -m bench.attack --prompt 30
    python -m bench.attack --prompt 400
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

from bench.generation import Load, Shape, random_llama, random_prompts, word_tokenizer

SMALL = Shape(hidden=256, layers=4, heads=4, feed_forward=688)  # 7 M parameters


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", type=int, default=30, help="tokens per prompt")
    parser.add_argument("--prompts", type=int, default=8, help="prompts, one batch")
    parser.add_argument("--new", type=int, default=100, help="the most new tokens")
    parser.add_argument("--ends-after", type=float, default=0.0, help="answers' usual length")
    parser.add_argument("--repeat", type=int, default=2)
    args = parser.parse_args()
    print(json.dumps(measure(args), indent=1))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return seconds of both sides, their ratio, and whether all tokens agree."""
    import torch

    from qresafe.hf.generate import Branch, generate_batch, generate_branches
    from qresafe.specs import AttackSpec, GenerateSpec
    from qresafe.stages.attack_grid import configurations

    torch.set_num_threads(1)
    tokenizer, model = word_tokenizer(), random_llama(SMALL, args.ends_after)
    texts = random_prompts(Load(shortest=args.prompt, longest=args.prompt), args.prompts)
    ids = [tokenizer.encode(text) for text in texts]
    branches = [
        Branch(
            [f"{row}/{one.name}" for row in range(len(ids))],
            GenerateSpec(max_new_tokens=args.new, **one.decoding.model_dump()),
        )
        for one in configurations(AttackSpec())
    ]
    sides: dict[str, Callable[[], Any]] = {
        "shared": lambda: generate_branches(model, tokenizer, ids, branches),
        "separate": lambda: [
            generate_batch(model, tokenizer, ids, b.keys, b.spec) for b in branches
        ],
    }
    best, made = dict.fromkeys(sides, float("inf")), dict[str, Any]()
    for _ in range(args.repeat):
        for name, side in sides.items():
            began = time.perf_counter()
            made[name] = side()
            best[name] = min(best[name], time.perf_counter() - began)
    completions = [g for branch in made["shared"] for g in branch]
    return {
        "seconds": {name: round(value, 2) for name, value in best.items()},
        "times_as_fast": round(best["separate"] / best["shared"], 2),
        "same_tokens": made["shared"] == made["separate"],
        "completions": len(completions),
        "new_tokens_each": round(sum(len(g.ids) for g in completions) / len(completions), 1),
        "prompt_tokens": args.prompt,
    }


if __name__ == "__main__":
    main()
