"""One, two and three hosts, each a network namespace of this machine with a Ray node of one CPU.

The same patch of the embedded model is made with as many workers as there are hosts, on a storage
that they share; before that, without Ray. Needs root and iproute2.

    python -m bench.hosts                 # writes docs/reliability/hosts.md
    python -m bench.hosts --hosts 1 2 --set pairs.harmful=64
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "reliability" / "hosts.md"
# 240 prompts for each of two models in batches of 8; the patch of the demo, but 16 steps of it.
LOAD = ["control=false", "quantize.steps=10", "pairs.harmful=160", "pairs.benign=40"]
LOAD += ["pairs.borderline=20", "pairs.recombined=20", "pairs.batch_size=8", "patch.steps=16"]


@dataclass(frozen=True)
class Made:
    """What one number of hosts took and made; 0 hosts: this process without Ray."""

    hosts: int
    start: float  # seconds until the nodes had joined
    whole: float  # seconds of the command
    stages: dict[str, float]  # stage -> seconds, the wait for its first worker included
    load: float  # processes that wanted a CPU in the last minute, as the command ended
    rows: int
    repeated: int
    completions: bytes
    codes: bytes


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--set", action="append", default=[], help="key=value, as of qresafe")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    settings = [*LOAD, *args.set]
    made = [without_ray(settings)]
    for count in args.hosts:
        made.append(on_hosts(count, settings))
        print(made[-1].hosts, made[-1].whole, made[-1].stages, flush=True)
    text = page(made, settings)
    print(text)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text)


def command(storage: Path, workers: int, settings: Sequence[str]) -> list[str]:
    words = [sys.executable, "-m", "qresafe.cli", "patch", "demo", "--json"]
    words += ["--workers", str(workers), "--storage", str(storage)]
    return words + [word for setting in settings for word in ("--set", setting)]


def without_ray(settings: Sequence[str]) -> Made:
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        ended = subprocess.run(
            command(Path(folder), 0, settings),
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # the threads of a worker
            capture_output=True,
            text=True,
        )
        return _made(0, 0.0, time.perf_counter() - began, ended)


def on_hosts(count: int, settings: Sequence[str]) -> Made:
    from tests.cluster.namespaces import Hosts

    began = time.perf_counter()
    with Hosts(count) as hosts:
        hosts.start_head()
        with ThreadPoolExecutor() as pool:
            list(pool.map(hosts.start_worker, range(1, count)))
        ready = time.perf_counter()
        joined = [*settings, f"resources.address={hosts.address}"]
        ended = hosts.run(
            0, command(hosts.folder / "storage", count, joined), cwd=ROOT, timeout=3600
        )
        return _made(count, ready - began, time.perf_counter() - ready, ended)


def _made(count: int, start: float, whole: float, ended: Any) -> Made:
    if ended.returncode:
        raise SystemExit(ended.stderr)
    stages = json.loads(ended.stdout)["stages"]
    folders = {stage["name"]: Path(stage["path"]) for stage in stages}
    answers = [
        folder / "completions.parquet" for name, folder in folders.items() if "generate" in name
    ]
    tables = [pq.read_table(file, columns=["prompt_id", "sample"]).to_pylist() for file in answers]
    rows = [
        (file.parent.name, *row.values())
        for file, t in zip(answers, tables, strict=True)
        for row in t
    ]
    return Made(
        hosts=count,
        start=start,
        whole=whole,
        stages={stage["name"]: stage["seconds"] for stage in stages},
        load=os.getloadavg()[0],
        rows=len(rows),
        repeated=len(rows) - len(set(rows)),
        completions=b"".join(file.read_bytes() for file in answers),
        codes=(folders["patch"] / "codes.safetensors").read_bytes(),
    )


def page(made: Sequence[Made], settings: Sequence[str]) -> str:
    """Return the Markdown page."""
    names = list(made[0].stages)
    header = ["hosts", "cluster starts", *names, "whole command", "rows", "repeated", "load"]
    lines = [_row(header), _row(["---"] * len(header))]
    for one in made:
        seconds = [f"{value:.1f}" for value in (*(one.stages[n] for n in names), one.whole)]
        figures = [str(one.rows), str(one.repeated), f"{one.load:.1f}"]
        lines.append(_row([_name(one), f"{one.start:.1f}", *seconds, *figures]))
    return "\n\n".join([_head(settings), "\n".join(lines), _findings(made)]) + "\n"


def _head(settings: Sequence[str]) -> str:
    return (
        "# Several hosts\n\n"
        f"Made by `make bench-hosts` (`python -m bench.hosts`) on {datetime.date.today()}, "
        f"{os.cpu_count()} CPU cores ({platform.machine()}) for all hosts together: each host is a "
        "network namespace with an address, a link and a Ray node of one CPU of its own. So more "
        "hosts than cores cannot be faster; what shows is what hosts cost, and that they change "
        "nothing. Seconds, each measured once; `load` is the machine's load average at the end, "
        "above the number of cores where other work shared it.\n\n"
        f"`qresafe patch demo --workers HOSTS --set {' --set '.join(settings)}`"
    )


def _findings(made: Sequence[Made]) -> str:
    alike = {one.completions for one in made}
    same = "equal byte for byte" if len(alike) == 1 else f"of {len(alike)} kinds"
    alone, rest = made[0], made[1:]
    extra = ", ".join(f"{one.whole - alone.whole:+.1f} s with {_name(one)}" for one in rest)
    codes = {_name(one): one.codes == alone.codes for one in rest}
    told = ", ".join(f"{name}: {'yes' if equal else 'no'}" for name, equal in codes.items())
    return (
        f"Completions of all rows are {same}. Against one process without Ray: {extra}. Codes of "
        f"the patch equal to that process's: {told} (sums over several training workers round "
        "otherwise than one worker's, so codes repeat for the same number of workers, not across "
        "numbers; `tests/cluster/test_hosts.py` has two workers on two hosts and on one agree "
        "byte for byte)."
    )


def _name(one: Made) -> str:
    return {0: "no Ray", 1: "1 host"}.get(one.hosts, f"{one.hosts} hosts")


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
