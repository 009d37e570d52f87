"""One command of at most nine minutes that measures the product on a single NVIDIA GPU.

Needs torch, transformers and peft; not Ray, DeepSpeed, bitsandbytes, pyarrow or pydantic.
Randomly initialised Llama shapes in bfloat16, made on the device, INT4 in groups of 128:

- the DPO step over both mask kinds against PEFT LoRA with the same loss, batch and rank;
- SNIP against a forward and backward pass that computes weight gradients;
- grids: bytes per second against a copy within the device's memory;
- generation against `model.generate`.

    python -m bench.gpu                             # prints the table
    python -m bench.gpu --out docs/results-gpu.md   # and writes it
    python -m bench.gpu --device cpu --shapes tiny  # the whole code path, in seconds
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from bench import gpu_measures as measures
from bench.gpu_measures import Place, Row
from bench.gpu_model import (
    SHAPES,
    Budget,
    OutOfTimeError,
    Shape,
    measure_limits,
    start_memory,
)

Measure = Callable[[Shape, Place], Iterable[Row]]
LIBRARIES = ("torch", "transformers", "peft")

# In the order of their worth: what the time does not reach comes last.
PLAN: dict[str, Measure] = {
    "DPO step, PEFT LoRA": lambda s, p: [measures.peft_step(s, p)],
    "DPO step, mask `factors`": lambda s, p: [measures.patch_step(s, p, "factors", False)],
    "DPO step, mask `weight`": lambda s, p: [measures.patch_step(s, p, "weight", True)],
    "forward+backward": lambda s, p: [measures.weight_gradients(s, p)],
    "SNIP, sums on the device": lambda s, p: [measures.snip_scores(s, p, in_files=False)],
    "grids": measures.grids,
    "generation": measures.generation,
    "SNIP, sums in files": lambda s, p: [measures.snip_scores(s, p, in_files=True)],
}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, write it if asked to; return the exit status."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench.gpu: no CUDA device; --device cpu --shapes tiny tries the code", flush=True)
        return 2
    # On a CPU, where nothing is to be learnt from the figures, in the dtype that is fast there.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    budget = Budget(options.minutes)
    place = Place(device, dtype, measure_limits(device, dtype), budget)
    found: dict[str, list[Row]] = {}
    for name in options.shapes.split(","):
        found[name] = []
        for row in _measure_all(SHAPES[name], place):
            found[name].append(row)
            if options.out:  # after every row: a lent machine may go before the last
                options.out.write_text(render(found, place))
    print(render(found, place))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", default="1b,7b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--minutes", type=float, default=9.0, help="what is left then is skipped")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    return parser


def _measure_all(shape: Shape, place: Place) -> Iterator[Row]:
    """Yield the rows one by one, each as soon as its measurement is done."""
    for name, measure in PLAN.items():
        yield from measure_one(name, measure, shape, place)


def measure_one(name: str, measure: Measure, shape: Shape, place: Place) -> list[Row]:
    """Return a measurement's rows; one that does not fit in time or memory is a row saying so."""
    rows: list[Row] = []
    try:
        start_memory(place.device)
        place.budget.check()
        rows += measure(shape, place)
    except OutOfTimeError:
        rows.append(Row(name, note="not measured: no time left"))
    except torch.cuda.OutOfMemoryError:
        rows.append(Row(name, note="does not fit into the GPU's memory"))
    print(f"{shape.name} {rows}", file=sys.stderr, flush=True)
    return rows


def render(found: dict[str, list[Row]], place: Place) -> str:
    """Return the Markdown page.

    Args:
        found: Shape name -> its rows.
        place: Where they were measured.
    """
    spent = time.monotonic() - place.budget.began
    cuda = place.device.type == "cuda"
    hardware = torch.cuda.get_device_name(place.device) if cuda else f"CPU ({platform.machine()})"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    limits = place.limits
    lines = [
        f"# {hardware}",
        "",
        f"Made by `python -m bench.gpu` on {datetime.date.today()} in {spent:.0f} s; {versions}; "
        f"{str(place.dtype).removeprefix('torch.')}, INT4 in groups of 128, rank {measures.RANK}, "
        "no gradient checkpointing.",
        f"Limits measured in the same run: copy {limits.bytes_per_second / 1e9:.0f} GB/s (read "
        f"and written), matrix product {limits.flops / 1e12:.2f} TFLOP/s.",
        "",
        "| shape | what | value | ratio to its peer | peak GiB | of the limit |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for shape, rows in found.items():
        values = {row.what: row.value for row in rows}
        lines += [_line(shape, row, values.get(row.peer or "")) for row in rows]
    return "\n".join(lines) + "\n"


def _line(shape: str, row: Row, peer: float | None) -> str:
    if row.value is None:
        return f"| {shape} | {row.what} | {row.note} | | | |"
    ratio = f"{row.value / peer:.2f}× {row.peer}" if peer else "–"
    memory = f"{row.memory:.1f}" if row.memory is not None else "–"
    share = f"{row.share:.1%} {row.note}" if row.share is not None else "–"
    value = f"{row.value:,.0f} {row.unit}"
    return f"| {shape} | {row.what} | {value} | {ratio} | {memory} | {share} |"


if __name__ == "__main__":
    sys.exit(main())
