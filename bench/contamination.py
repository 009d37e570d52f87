"""How long it takes to compare a calibration pool with the evaluation prompts.

python -m bench.contamination                 # 10,000 x 1,000 prompts
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time

import pyarrow as pa

WORDS = 5000


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool", type=int, default=10_000)
    parser.add_argument("--asked", type=int, default=1_000)
    args = parser.parse_args()

    from qresafe.stages.contamination import decontaminate

    pool, asked = prompts(args.pool, 1), prompts(args.asked, 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    _, found = decontaminate(pool, asked, 0.8)
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told = {"seconds": round(seconds, 2), "megabytes": round((after - before) / 1024)}
    print(json.dumps(told | found.model_dump(exclude={"examples"}), indent=1))


def prompts(count: int, seed: int) -> pa.Table:
    """Return prompts of ten to twenty words, drawn as words of a language are: few are common."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(WORDS)]
    weights = [1 / rank for rank in range(1, WORDS + 1)]
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(words, weights, k=draw.randint(10, 20))) for _ in range(count)]
    return pa.table({"prompt_id": [f"{seed}-{i}" for i in range(count)], "prompt": texts})


if __name__ == "__main__":
    main()
