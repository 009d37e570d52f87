"""Time and memory of our quantizer calls against the same libraries called directly.

Each call is a process of its own, in turns, on the embedded model: loading, calibrating and
saving count, imports do not. Both sides calibrate on the same chats.

    python -m bench.quantize_speed                 # prints a Markdown table
    python -m bench.quantize_speed --only fp8 --turns 1
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench import clock

TARGET = 1.1  # ours / theirs
SIDES = ("ours", "direct")
SETTINGS: dict[str, dict[str, Any]] = {
    "gptq": {"group_size": 64, "sequences": 128},
    "awq": {"group_size": 64, "sequences": 32},
    "fp8": {"activations": "static", "sequences": 128},
    "bnb": {"format": "nf4"},
}


def main() -> None:
    """Measure all methods, or one side of one method in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help="this one alone, in this process")
    given = parser.parse_args()
    if given.side:
        print(json.dumps(one_call(given.only[0], given.side)))
        return
    print("\n".join(table({method: measure(method, given.turns) for method in given.only})))


def measure(method: str, turns: int) -> dict[str, list[dict[str, float]]]:
    """Return each side's seconds and peak memory, turn by turn."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(turns):
        for side in SIDES:
            command = [sys.executable, "-m", "bench.quantize_speed", "--only", method]
            done = subprocess.run(
                [*command, "--side", side], capture_output=True, text=True, check=True
            )
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
    return found


def table(found: dict[str, dict[str, list[dict[str, float]]]]) -> list[str]:
    """Return the medians over turns as a Markdown table."""
    lines = [f"| method | ours, s | direct, s | ratio (target <= {TARGET}) | memory ratio |"]
    lines.append("|---|---|---|---|---|")
    for method, sides in found.items():
        middle = {
            (side, what): statistics.median(turn[what] for turn in sides[side])
            for side in SIDES
            for what in ("seconds", "mib")
        }
        ours, direct = (middle[side, "seconds"] for side in SIDES)
        memory = middle["ours", "mib"] / middle["direct", "mib"]
        lines.append(
            f"| {method} | {ours:.2f} | {direct:.2f} | {ours / direct:.2f} | {memory:.2f} |"
        )
    return [*lines, "", f"Seconds are {clock.kind()}."]


def one_call(method: str, side: str) -> dict[str, float]:
    """Quantize the embedded model once; return seconds and this process's peak memory."""
    from pydantic import TypeAdapter

    from qresafe.embedded.build import embedded_model_path
    from qresafe.quantize_specs import QuantizeSpec
    from qresafe.registry import quantizers

    source = embedded_model_path()
    calibration = {} if method == "bnb" else {"calibration": {"risk": "I"}}
    spec = TypeAdapter(QuantizeSpec).validate_python(
        {"method": method} | SETTINGS[method] | calibration
    )
    # Made on both sides, so that both have the libraries imported before the clock starts.
    direct = {"gptq": _gptq, "awq": _awq, "fp8": _fp8, "bnb": _bnb}[method](source, spec)
    ours = quantizers.get(method)
    call = partial(ours, source, spec=spec) if side == "ours" else direct
    with tempfile.TemporaryDirectory() as folder:
        began = clock.now()
        call(Path(folder))
        seconds = clock.now() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "mib": peak}


def _gptq(source: Path, spec: Any) -> Callable[[Path], None]:
    from llmcompressor.modifiers.gptq import GPTQModifier

    return _oneshot(source, spec, lambda: [GPTQModifier(**_scheme(_integers(spec)))])


def _awq(source: Path, spec: Any) -> Callable[[Path], None]:
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    IntermediatesCache.pin_memory = lambda *_: None  # it asks for an accelerator
    rounding = _scheme(_integers(spec))
    return _oneshot(source, spec, lambda: [AWQModifier(), QuantizationModifier(**rounding)])


def _fp8(source: Path, spec: Any) -> Callable[[Path], None]:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    float8 = {"num_bits": 8, "type": "float", "symmetric": True}
    scheme = _scheme(float8 | {"strategy": "channel"}, float8 | {"strategy": "tensor"})
    return _oneshot(source, spec, lambda: [QuantizationModifier(**scheme)])


def _bnb(source: Path, spec: Any) -> Callable[[Path], None]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    def call(target: Path) -> None:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=spec.format)
        model = AutoModelForCausalLM.from_pretrained(
            source, quantization_config=config, dtype="auto", device_map={"": "cpu"}
        )
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(source).save_pretrained(target)

    return call


def _oneshot(source: Path, spec: Any, recipe: Callable[[], list[Any]]) -> Callable[[Path], None]:
    """Return what llm-compressor's own examples do: load, tokenize, `oneshot`, save."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qresafe.embedded.calibration import calibration_chats

    chats = calibration_chats(spec.calibration, spec.seed)[: spec.sequences]

    def call(target: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(source)
        texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        rows = [tokenizer(text, add_special_tokens=False) for text in texts]
        data = Dataset.from_list([dict(row) for row in rows])
        oneshot(model=model, tokenizer=tokenizer, dataset=data, recipe=recipe())
        model.save_pretrained(target, save_compressed=True)
        tokenizer.save_pretrained(target)

    return call


def _integers(spec: Any) -> dict[str, Any]:
    shape = {"strategy": "group", "group_size": spec.group_size}
    return shape | {"num_bits": spec.bits, "symmetric": spec.symmetric}


def _scheme(weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}


if __name__ == "__main__":
    main()
