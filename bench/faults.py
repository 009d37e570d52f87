"""Random faults at random moments in generate, patch and search: docs/reliability/faults.md.

    python -m bench.faults                     # 60 faults, seeded
    python -m bench.faults --faults 6 --page /tmp/page.md

One fault hits one run of one command on a Ray head of our own with two CPUs. The command is run
again until it ends well, as a user or a job scheduler would, the head is started again if it was
lost, and the result is compared with that of a run without faults. Results are kept as they come:
the same command goes on where an earlier one was ended (`rm .bench/faults.jsonl` begins anew), and
writes a page from all of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.fault_head import Cluster, Head, end, family
from bench.fault_kinds import Fault, Kind, kinds_for
from bench.fault_runs import (
    WORKLOADS,
    Difference,
    Rows,
    Workload,
    command,
    difference,
    fresh,
    prepare,
)

PAGE = Path(__file__).parents[1] / "docs" / "reliability" / "faults.md"
RUNS = 6  # a command is given up after so many
PATIENCE = 4  # a command that takes so many times the fault-free time, and ...
TRACES = ("[", "/", "***")  # how the lines of Ray's own aborts begin
GRACE = 90.0  # ... so many seconds more, hangs: the supervisor kills it


@dataclass(frozen=True)
class Result:
    """What one fault did.

    Attributes:
        workload: Its name.
        kind: The kind of fault, in words.
        hit: The process ids, or the file.
        after: Seconds from the command's start to the fault.
        runs: How often the command was run; 1: it got over the fault by itself.
        hangs: How often the supervisor had to end it.
        ended: Whether it ended well at last.
        difference: Of its result from the fault-free one.
        seconds: From the first start to the good end, waiting for the cluster included.
        baseline: The same without a fault.
        said: Last line of the command's output in each run that failed.
    """

    workload: str
    kind: str
    hit: str
    after: float
    runs: int
    hangs: int
    ended: bool
    difference: Difference
    seconds: float
    baseline: float
    said: list[str]


class Bench:
    """A cluster, the common stages, and what comes out without faults.

    Args:
        folder: Short path for everything.
        cluster: What the faults hit; default: a head of our own.
    """

    def __init__(self, folder: Path, cluster: Cluster | None = None) -> None:
        self._folder, self._head = folder, cluster or Head(folder / "h")
        folder.mkdir(parents=True, exist_ok=True)
        self._base = prepare(folder, self._head.environment())
        self._expected: dict[str, tuple[Rows, float, dict[str, float]]] = {}

    def close(self) -> None:
        """End the cluster."""
        self._head.end()

    def fault_free(self, workload: Workload) -> tuple[Rows, float, dict[str, float]]:
        """Return rows, seconds, and for each target how long before the end it came up."""
        if workload.name not in self._expected:
            self._head.start()
            run = fresh(self._base, self._folder / "free", workload)
            began, seen = time.monotonic(), dict[str, float]()
            driver = self._start(workload, self._folder / "free")
            while driver.poll() is None:
                for name, titles in workload.targets.items():
                    if name not in seen and self._head.processes(*titles):
                        seen[name] = time.monotonic()
                time.sleep(0.1)
            ended = time.monotonic()
            rows = workload.rows(run)
            if driver.returncode or not rows or len(seen) < len(workload.targets):
                raise RuntimeError(f"the fault-free {workload.name} failed: {self._said()}")
            lasted = {name: ended - came for name, came in seen.items()}
            self._expected[workload.name] = rows, ended - began, lasted
        return self._expected[workload.name]

    def hit(
        self, workload: Workload, kind: Kind, draw: random.Random, make: type[Fault] = Fault
    ) -> Result | None:
        """Run a workload with one fault; None: it had ended before the fault could hit it."""
        rows, baseline, lasted = self.fault_free(workload)
        self._head.start()
        run = fresh(self._base, self._folder / "hit", workload)
        fault = make(kind, draw, self._head, workload)
        moment = fault.moment(lasted, baseline)
        began, runs, hangs, said = time.monotonic(), 0, 0, list[str]()
        after, code = 0.0, -1
        while code and runs < RUNS:
            self._head.start()  # what a supervisor of the cluster does
            runs += 1
            driver = self._start(workload, self._folder / "hit")
            if runs == 1:
                wait_for(fault, driver, moment)
                after = time.monotonic() - began
                fault.inject(driver.pid, run)
            code, hung = self._watch(driver, baseline)
            hangs += hung
            if code:
                said.append(f"hung; {self._said()}" if hung else self._said())
        seconds = time.monotonic() - began
        if not fault.hit:
            return None
        found = difference(rows, workload.rows(run))
        return Result(workload.name, str(kind), fault.hit, round(after, 1), runs, hangs,
                      code == 0, found, round(seconds, 1), round(baseline, 1), said)  # fmt: skip

    def _start(self, workload: Workload, storage: Path) -> subprocess.Popen[Any]:
        with open(self._folder / "driver.log", "wb") as log:
            return self._head.popen(command(workload, storage), log)

    def _watch(self, driver: subprocess.Popen[Any], baseline: float) -> tuple[int, bool]:
        try:
            return driver.wait(PATIENCE * baseline + GRACE), False
        except subprocess.TimeoutExpired:
            doomed = family(driver.pid)
            driver.kill()
            end(doomed)
            return driver.wait(), True

    def _said(self) -> str:
        lines = (self._folder / "driver.log").read_text(errors="replace").strip().splitlines()
        words = [line for line in lines if not line.startswith(TRACES)]
        return words[-1][:300] if words else "nothing"


def wait_for(fault: Fault, driver: subprocess.Popen[Any], moment: float) -> None:
    """Wait until there is what the fault hits, then for its moment."""
    while not fault.victims(driver.pid) and driver.poll() is None:
        time.sleep(0.05)
    deadline = time.monotonic() + moment
    while time.monotonic() < deadline and driver.poll() is None:
        time.sleep(0.05)


def plan(seed: int) -> Iterator[tuple[Workload, Kind, random.Random]]:
    """Yield faults without end: rounds of all kinds of all workloads, each round shuffled."""
    draw = random.Random(seed)
    every = [(w, kind) for w in WORKLOADS.values() for kind in kinds_for(w)]
    while True:
        for workload, kind in draw.sample(every, len(every)):
            yield workload, kind, random.Random(draw.random())


def main() -> None:
    """Inject the faults that are asked for and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=600, help="begin none after these")
    parser.add_argument("--results", type=Path, default=Path(".bench/faults.jsonl"))
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    from bench.fault_page import page

    last = time.monotonic() + 60 * args.minutes
    args.results.parent.mkdir(parents=True, exist_ok=True)
    tried = read(args.results)
    with (
        tempfile.TemporaryDirectory(prefix="qf", dir="/tmp") as folder,
        closing(Bench(Path(folder))) as bench,
        open(args.results, "a") as kept,
    ):
        for workload, kind, draw in itertools.islice(plan(args.seed), len(tried), None):
            if sum(r is not None for r in tried) >= args.faults or time.monotonic() > last:
                break
            found = bench.hit(workload, kind, draw)
            tried.append(found)
            line = json.dumps(found and asdict(found))  # null: it came too late
            kept.write(line + "\n")
            kept.flush()
            print(f"{workload.name}: {kind}: {line}", flush=True)
    args.page.parent.mkdir(parents=True, exist_ok=True)
    args.page.write_text(page([result for result in tried if result], args.seed))


def read(path: Path) -> list[Result | None]:
    """Return what earlier commands found, in the order of the plan."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [_result(json.loads(line)) for line in lines]


def _result(fields: dict[str, Any] | None) -> Result | None:
    if fields is None:
        return None
    return Result(**(fields | {"difference": Difference(**fields["difference"])}))


if __name__ == "__main__":
    main()
