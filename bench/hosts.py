"""One, two and three hosts, each a network namespace of this machine with a Ray node of its own.

The same patch of the embedded model is made on each of them, with a worker per host on a storage
that they share; before that, without Ray; and with two workers on one host, whose bytes two hosts
must make. Needs root and iproute2.

    python -m bench.hosts                 # writes docs/reliability/hosts.md
    python -m bench.hosts --hosts 1 2 --set pairs.harmful=128
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from upath import UPath

from bench.host_runs import ROOT, SETTINGS, TIMEOUT, command, results, seconds

OUT = ROOT / "docs" / "reliability" / "hosts.md"
LOAD = [*SETTINGS, "pairs.harmful=48", "patch.steps=8"]


@dataclass(frozen=True)
class Made:
    """What one cluster took and made.

    Attributes:
        hosts: How many; 0 is this process without Ray.
        workers: How many, on all hosts together.
        start: Seconds until the nodes had joined.
        whole: Seconds of the command.
        stages: Stage -> seconds, with the wait for its first worker.
        load: Load average of the machine as the command ended.
        files: What it made, by kind, key and file.
    """

    hosts: int
    workers: int
    start: float
    whole: float
    stages: Mapping[str, float]
    load: float
    files: Mapping[str, bytes]

    def equals(self, other: Made, *kinds: str) -> bool:
        """Return whether both made the same files of these kinds, to the byte."""
        mine, theirs = self.of(*kinds), other.of(*kinds)
        return bool(mine) and mine == theirs

    def of(self, *kinds: str) -> dict[str, bytes]:
        """Return the files of these kinds (stages)."""
        return {name: data for name, data in self.files.items() if name.split("/")[0] in kinds}


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--set", action="append", default=[], help="key=value, as of qresafe")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    settings = [*LOAD, *args.set]
    made = [without_ray(settings)]
    for hosts, workers in [(1, 2), *((count, count) for count in args.hosts)]:
        made.append(on_hosts(hosts, workers, settings))
        print(_name(made[-1]), made[-1].whole, made[-1].stages, flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page(made, settings))


def without_ray(settings: Sequence[str]) -> Made:
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        words = command(folder, workers=0, settings=settings)
        env = os.environ | {"OMP_NUM_THREADS": "1"}  # the threads of a worker
        ended = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
        return _made(0, 0, 0.0, time.perf_counter() - began, Path(folder), ended)


def on_hosts(count: int, workers: int, settings: Sequence[str]) -> Made:
    from tests.cluster.namespaces import Hosts

    began = time.perf_counter()
    with Hosts(count) as hosts:
        hosts.start_head(cpus=workers // count)
        with ThreadPoolExecutor() as pool:
            list(pool.map(hosts.start_worker, range(1, count)))
        ready, storage = time.perf_counter(), hosts.folder / "storage"
        words = command(storage, workers=workers, address=hosts.address, settings=settings)
        ended = hosts.run(0, words, cwd=ROOT, timeout=TIMEOUT)
        took = time.perf_counter() - ready
        return _made(count, workers, ready - began, took, storage, ended)


def _made(
    hosts: int,
    workers: int,
    start: float,
    whole: float,
    storage: Path,
    ended: subprocess.CompletedProcess[str],
) -> Made:
    if ended.returncode:
        raise SystemExit(ended.stderr)
    stages, load = seconds(json.loads(ended.stdout)), os.getloadavg()[0]
    return Made(hosts, workers, start, whole, stages, load, results(UPath(storage)))


def page(made: Sequence[Made], settings: Sequence[str]) -> str:
    """Return the Markdown page."""
    names = list(made[0].stages)
    header = ["hosts", "cluster starts", *names, "whole command", "load"]
    lines = [_row(header), _row(["---", *["---:"] * (len(header) - 1)])]
    for one in made:
        figures = [one.start, *(one.stages[name] for name in names), one.whole, one.load]
        lines.append(_row([_name(one), *(f"{figure:.1f}" for figure in figures)]))
    return "\n\n".join([_head(settings), "\n".join(lines), _findings(made)]) + "\n"


def _head(settings: Sequence[str]) -> str:
    return (
        "# Several hosts\n\n"
        f"Made by `make bench-hosts` (`python -m bench.hosts`) on {datetime.date.today()}, "
        f"{os.cpu_count()} CPU cores ({platform.machine()}) for all hosts together: each host is a "
        "network namespace with an address, a link and a Ray node of its own. So more hosts than "
        "cores cannot be faster; what shows is what hosts cost, and that they change nothing. "
        "Seconds, each measured once; `load` is the machine's load average at the end: above the "
        "number of workers, other work shared the cores, and rows with different loads cannot be "
        "compared by their seconds.\n\n"
        f"`qresafe patch cpu-smoke --workers WORKERS --set {' --set '.join(settings)}`"
    )


def _findings(made: Sequence[Made]) -> str:
    alone, twice, rest = made[0], made[1], made[1:]
    extra = ", ".join(f"{one.whole - alone.whole:+.1f} s with {_name(one)}" for one in rest)
    answers = all(one.equals(alone, "generate", "pairs") for one in rest)
    lines = [
        f"- Answers and pairs of all rows equal to the byte: {_yes(answers)}.",
        f"- Against one process without Ray, the command took {extra}.",
    ]
    for one in made[2:]:
        if one.workers == twice.workers:
            same = _yes(one.equals(twice, "patch"))
            lines.append(
                f"- The patch (codes and adapter) of {_name(one)} equal to that of {_name(twice)}, "
                f"to the byte: {same}. "
                "`tests/cluster/test_hosts.py` (`make test-long`) asks the same of three hosts."
            )
    codes = ", ".join(f"{_name(one)}: {_yes(one.equals(alone, 'patch'))}" for one in rest)
    lines.append(
        f"- The patch equal to that of the process without Ray: {codes}. Sums over several workers "
        "round otherwise than one worker's, so a patch repeats for the same number of workers, "
        "wherever they are, and need not for another number."
    )
    return "\n".join(lines)


def _name(one: Made) -> str:
    if not one.hosts:
        return "no Ray"
    hosts = "1 host" if one.hosts == 1 else f"{one.hosts} hosts"
    return hosts if one.hosts == one.workers else f"{hosts} with {one.workers} workers"


def _yes(true: bool) -> str:
    return "yes" if true else "**no**"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
