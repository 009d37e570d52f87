"""Peak memory of quantizing a model as if it did not fit: 32 blocks, 415 MB in float32.

    python -m bench.layerwise                 # prints a Markdown table
    python -m bench.layerwise --only bnb gptq

Each method runs in a process of its own, told that no memory is free. It first quantizes the small
embedded model, so that libraries do not count: what is told is the peak of resident memory above
what the process held before the large one (Linux's VmHWM, started anew, less VmRSS). The C library
is told to give memory back as soon as it is freed, so that what is counted was in use.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FEW = {"sequences": 4, "max_length": 64, "calibration": {"risk": "I"}}
SETTINGS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "bnb nf4": {"method": "bnb", "format": "nf4", "double_quant": True},
    "bnb int8": {"method": "bnb", "format": "int8"},
    "fp8 dynamic": {"method": "fp8"},
    "fp8 static": {"method": "fp8", "activations": "static"} | FEW,
    "gptq": {"method": "gptq"} | FEW,
    "awq": {"method": "awq", "grid_points": 3} | FEW,
    # few and long groups: so that it ends soon, which its memory does not depend on much
    "aqlm": {"method": "aqlm", "codebook_bits": 4, "group_size": 64, "rounds": 1, "beam": 1}
    | {"finetune_steps": 1}
    | FEW,
}
SMALL = {"gptq": {"group_size": 32}, "awq": {"group_size": 32}}  # what the embedded model takes
SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 32}
MB = 1e6


def main() -> None:
    """Measure the methods asked for, or one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--source", type=Path, help="measure one method on it, in this process")
    given = parser.parse_args()
    if given.source:
        print(json.dumps(one_call(given.only[0], given.source)))
        return
    with tempfile.TemporaryDirectory() as folder:
        source = make_model(Path(folder))
        weights = (source / "model.safetensors").stat().st_size
        block = weights / SIZES["num_hidden_layers"]
        print(f"W has {weights / MB:.0f} MB of weights, {block / MB:.0f} MB a block.\n")
        print("| method | more memory, MB | of W | s |\n|---|---|---|---|")
        for name in given.only:
            found = measure(name, source)
            share = found["bytes"] / weights
            print(f"| {name} | {found['bytes'] / MB:.0f} | {share:.0%} | {found['seconds']:.0f} |")


def make_model(folder: Path) -> Path:
    """Write a random Llama with the embedded model's tokenizer into an empty folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from qresafe.embedded.build import embedded_model_path
    from qresafe.hf.writing import copy_sidecars

    config = AutoConfig.from_pretrained(embedded_model_path(), **SIZES)
    config.num_attention_heads = config.num_key_value_heads = 8
    config.head_dim = config.hidden_size // config.num_attention_heads
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    copy_sidecars(Path(embedded_model_path()), folder)
    return folder


def measure(name: str, source: Path) -> dict[str, float]:
    """Return bytes and seconds of one method on `source`, from a process of its own."""
    command = [sys.executable, "-m", "bench.layerwise", "--only", name, "--source", str(source)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def one_call(name: str, source: Path) -> dict[str, float]:
    """Quantize the embedded model, then `source`; return what the latter took more."""
    from qresafe.embedded.build import embedded_model_path
    from qresafe.hf import offloaded

    offloaded.free_memory = lambda: 0
    settings = SETTINGS[name]
    quantize(Path(embedded_model_path()), settings | SMALL.get(name, {}))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    held, began = resident("VmRSS"), time.perf_counter()
    quantize(source, settings)
    return {"bytes": resident("VmHWM") - held, "seconds": time.perf_counter() - began}


def resident(line: str) -> int:
    """Return bytes from a line of this process's status file."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(text.split()[1]) for text in status if text.startswith(f"{line}:"))


def quantize(source: Path, settings: dict[str, Any]) -> None:
    """Quantize a model into a folder that is thrown away."""
    from pydantic import TypeAdapter

    from qresafe.quantize_specs import QuantizeSpec
    from qresafe.registry import quantizers

    spec = TypeAdapter(QuantizeSpec).validate_python(settings)
    with tempfile.TemporaryDirectory() as folder:
        quantizers.get(spec.method)(source, Path(folder), spec)


if __name__ == "__main__":
    main()
