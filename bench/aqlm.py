"""Perplexity and stored bits per weight of the embedded model by AQLM, RTN and GPTQ.

Perplexity is that of the reference answers to held-out benign prompts, under the weights that each
checkpoint decodes to. Bits per weight are the bytes of all that is stored of the quantized layers.
GPTQ is measured where the installed qresafe has it; any other checkpoint by its folder.

    python -m bench.aqlm                            # the default rows, split dev
    python -m bench.aqlm gptq-2=runs/.../checkpoint # and one more
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from qresafe.embedded.build import embedded_model_path
from qresafe.embedded.corpus import evaluation_prompts
from qresafe.hf.chat import answer_ids, prompt_ids
from qresafe.hf.checkpoint import QuantizedCheckpoint, load_dense
from qresafe.hf.generate import sequence_logps
from qresafe.hf.models import load_model, load_tokenizer
from qresafe.quantize_specs import QuantizeSpec
from qresafe.quantizers.base import CHECKPOINT
from qresafe.registry import quantizers
from qresafe.stages.utility import perplexity

AQLM = {"method": "aqlm"}
ROWS: dict[str, dict[str, Any]] = {
    "rtn 2 bits g64": {"method": "rtn", "bits": 2, "group_size": 64},
    "rtn 2 bits g32": {"method": "rtn", "bits": 2, "group_size": 32},
    "rtn 4 bits g64": {"method": "rtn", "bits": 4, "group_size": 64},
    "gptq 2 bits g32": {"method": "gptq", "bits": 2, "group_size": 32, "symmetric": False},
    "aqlm 2x8 g8": AQLM,
    "aqlm 2x8 g8, no tuning": AQLM | {"finetune_steps": 0},
    "aqlm 4x4 g8 (small books)": AQLM | {"codebooks": 4, "codebook_bits": 4},
    "aqlm 2x6 g8 (small books)": AQLM | {"codebook_bits": 6},
    "aqlm 4x8 g8": AQLM | {"codebooks": 4},
}


def main() -> None:
    """Quantize, measure, and print one row for each checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="*", help="NAME=FOLDER of further checkpoints")
    parser.add_argument("--split", default="dev", choices=("dev", "test"))
    options = parser.parse_args()
    source = embedded_model_path()
    print("| checkpoint | bits per weight | perplexity | seconds |\n|---|---|---|---|")
    print(f"| W | 32 | {answers_perplexity(load_model(source), options.split):.4f} | |", flush=True)
    for told in options.checkpoints:
        name, _, folder = told.partition("=")
        print(row(name, Path(folder), options.split, None), flush=True)
    for name, settings in ROWS.items():
        if settings["method"] not in quantizers.names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            spec: Any = TypeAdapter(QuantizeSpec).validate_python(settings)
            started = time.monotonic()
            quantizers.get(spec.method)(source, Path(folder), spec, control=False)
            seconds = time.monotonic() - started
            print(row(name, Path(folder) / CHECKPOINT, options.split, seconds), flush=True)


def row(name: str, folder: Path, split: str, seconds: float | None) -> str:
    """Return a checkpoint's line of the table."""
    model, _ = load_dense(folder)
    took = "" if seconds is None else f"{seconds:.0f}"
    measured = answers_perplexity(model, split)
    return f"| {name} | {stored_bits(folder):.2f} | {measured:.4f} | {took} |"


def stored_bits(folder: Path) -> float:
    """Return the stored bits of the quantized layers per weight of theirs."""
    checkpoint = QuantizedCheckpoint.open(folder)
    entries = checkpoint.files.entries
    parts = [entries[part] for name in checkpoint.names for part in checkpoint.codec.tensors(name)]
    weights = sum(math.prod(checkpoint.read(name).grid.shape) for name in checkpoint.names)
    return 8 * sum(entry.end - entry.begin for entry in parts) / weights


def answers_perplexity(model: Any, split: str) -> float:
    """Return the perplexity of the reference answers to the split's benign prompts."""
    tokenizer = load_tokenizer(embedded_model_path())
    table = evaluation_prompts("benign", split).to_pylist()
    prompts = [prompt_ids(tokenizer, line["prompt"]) for line in table]
    answers = [answer_ids(tokenizer, line["target"]) for line in table]
    logps, tokens = sequence_logps(model, prompts, answers)
    return perplexity(logps.tolist(), tokens.tolist()) or math.inf


if __name__ == "__main__":
    main()
