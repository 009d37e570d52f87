"""Ray's autoscaler from no node to two and back to none, around one run: its time line.

The head's autoscaler starts and stops Ray nodes in network namespaces of this machine, by
`tests.cluster.provider`. The run asks for two workers; what it makes is compared with what two
workers of a cluster that does not grow make. Needs root and iproute2.

    python -m bench.autoscale             # writes docs/reliability/autoscaling.md and its plot
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
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow.parquet as pq
from upath import UPath

from bench.host_runs import ROOT, SETTINGS, command, on_one_host, results

OUT = ROOT / "docs" / "reliability" / "autoscaling.md"
WORKERS = 2
IDLE_SECONDS = 30.0
WAIT_SECONDS = 1200  # for nodes, which take minutes to start where other work has the machine
RUN_SECONDS, SHRINK_SECONDS = 1500.0, 300.0
EVERY = 0.5

# Runs on the head, without joining the cluster: prints the CPUs that are asked for, as they change.
ASKED = """
import json, sys, time
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray._raylet import GcsClient
client, last = GcsClient(address=sys.argv[1]), None
while True:
    text = client.internal_kv_get(DEBUG_AUTOSCALING_STATUS.encode(), None)
    report = (json.loads(text) if text else {}).get("load_metrics_report") or {}
    bundles = [*report.get("resource_demand", []), *report.get("request_demand", [])]
    for group, count in report.get("pg_demand", []):
        bundles += [[bundle, each * count] for bundle, each in group["bundles"]]
    cpus = sum(bundle.get("CPU", 0) * count for bundle, count in bundles)
    if cpus != last:
        print(json.dumps({"at": time.time(), "cpus": cpus}), flush=True)
        last = cpus
    time.sleep(0.5)
"""
Line = list[tuple[float, float]]  # (seconds since the run was started, value from then on)


def main() -> None:
    """Measure, and write the page and its plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    lines, events, equal = measure()
    out.parent.mkdir(parents=True, exist_ok=True)
    plot(lines, out.with_suffix(".svg"))
    out.write_text(page(lines, events, equal, out.with_suffix(".svg").name))


def measure() -> tuple[dict[str, Line], list[tuple[float, str]], bool]:
    """Run on a cluster that grows and on one that does not.

    Returns:
        Lines by name, what happened when, and whether both made the same bytes.
    """
    from tests.cluster.namespaces import Hosts
    from tests.cluster.provider import Cloud

    with Hosts(WORKERS + 1) as hosts, tempfile.TemporaryDirectory() as folder:
        cloud = Cloud(hosts, idle_seconds=IDLE_SECONDS)
        address, storage = cloud.start_head(), hosts.folder / "storage"
        asked, told = Path(folder, "asked.jsonl"), Path(folder, "run.log")
        with asked.open("w") as file, told.open("w") as log:
            hosts.popen(0, [sys.executable, "-c", ASKED, address], stdout=file)  # ends with them
            began = time.time()
            settings = [*SETTINGS, f"resources.wait_seconds={WAIT_SECONDS}"]
            words = command(storage, workers=WORKERS, address=address, settings=settings)
            run = hosts.popen(0, words, cwd=ROOT, stdout=log, stderr=log)
            rows = _watch_rows(run, storage, began)
            ended = time.time() - began
        if run.returncode:
            raise SystemExit(f"the run ended with {run.returncode}: {told.read_text()}")
        deadline = time.monotonic() + SHRINK_SECONDS
        while cloud.alive() and time.monotonic() < deadline:
            time.sleep(EVERY)
        events = [(event["at"] - began, event["what"]) for event in cloud.events()]
        demand = [json.loads(line) for line in asked.read_text().splitlines()]
        lines = {
            "CPUs asked for": [(one["at"] - began, one["cpus"]) for one in demand],
            "nodes alive": _alive(events),
            "completions": rows,
        }
        made = results(UPath(storage))
    return (
        lines,
        [(0.0, "run started"), *events, (ended, "run ended")],
        made == on_one_host(WORKERS),
    )


def _watch_rows(run: subprocess.Popen[str], storage: Path, began: float) -> Line:
    """Wait for the run's end; return how many completions there were, and since when."""
    line: Line = [(0.0, 0)]
    while time.time() - began < RUN_SECONDS:
        over = run.poll() is not None
        if (rows := _rows(storage)) > line[-1][1]:
            line.append((time.time() - began, rows))
        if over:
            return line
        time.sleep(EVERY)
    run.kill()
    run.wait()
    return line


def _rows(storage: Path) -> int:
    """Count the completions of all arms: finished tables, and the parts of those unfinished."""
    whole = {path.parent: [path] for path in storage.rglob("completions.parquet")}
    for path in storage.glob("runs/*/generate/*/work/parts/part-*.parquet"):
        whole.setdefault(path.parents[2], []).append(path)
    return sum(_length(path) for key in whole for path in _chosen(whole[key]))


def _chosen(paths: Sequence[Path]) -> Sequence[Path]:
    """Return a whole table without the parts that it was made of, or the parts."""
    return paths[:1] if paths[0].name == "completions.parquet" else paths


def _length(path: Path) -> int:
    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, ValueError):  # moved away, or not whole yet
        return 0


def _alive(events: Sequence[tuple[float, str]]) -> Line:
    line: Line = [(0.0, 0)]
    for at, what in events:
        change = {"joined": 1, "stopped": -1, "lost": -1}.get(what, 0)
        if change:
            line.append((at, line[-1][1] + change))
    return line


def plot(lines: Mapping[str, Line], file: Path) -> None:
    """Draw the lines over time, one panel each."""
    import matplotlib.pyplot as plt

    from bench.quantizers_plots import PAINTS, save_svg

    figure, panels = plt.subplots(len(lines), 1, figsize=(9, 4.5), sharex=True)
    end = max(line[-1][0] for line in lines.values()) * 1.03
    for panel, (name, line), paint in zip(panels, lines.items(), PAINTS, strict=False):
        times, values = zip(*line, (end, line[-1][1]), strict=True)
        panel.step(times, values, where="post", color=paint, linewidth=1.4)
        panel.fill_between(times, values, step="post", color=paint, alpha=0.15)
        panel.set(ylabel=name, xlim=(0, end), ylim=(0, 1.15 * max(*values, 1)))
    panels[-1].set_xlabel("seconds since the run was started")
    save_svg(figure, file)


def page(
    lines: Mapping[str, Line], events: Sequence[tuple[float, str]], equal: bool, plotted: str
) -> str:
    """Return the Markdown page."""
    most = max(value for _, value in lines["nodes alive"])
    last = lines["nodes alive"][-1][1]
    told = [(at, _sentence(what)) for at, what in events]
    told += [(lines["completions"][1][0], "first completions on the storage")]
    told += [(lines["completions"][-1][0], "last completions on the storage")]
    told += [(at, f"{cpus:g} CPUs asked for") for at, cpus in lines["CPUs asked for"] if at > 0]
    table = [f"| {at:.1f} | {what} |" for at, what in sorted(told)]
    same = "equal to the byte" if equal else "**not equal**"
    return "\n".join(
        [
            "# A cluster that grows and shrinks",
            "",
            f"Made by `make bench-autoscale` (`python -m bench.autoscale`) on "
            f"{datetime.date.today()}, {os.cpu_count()} CPU cores ({platform.machine()}), load "
            f"{os.getloadavg()[0]:.1f} at the end. Ray's own autoscaler runs on a head that "
            "computes nothing; its cloud is this machine: a node is a Ray node in a network "
            "namespace of its own, started and stopped by a test-only node provider "
            f"(`tests/cluster/provider.py`), after {IDLE_SECONDS:g} idle seconds. "
            "The demand is what the autoscaler publishes at the end of a round, which lasts as "
            "long as the start of nodes: so it shows late. A node's idle time seems to count from "
            "the start of its own processes, before it has joined. Between stages that need no "
            "worker, nodes go and come again.",
            "",
            f"`qresafe patch cpu-smoke --workers {WORKERS}` on a cluster of no node: it grew to "
            f"{most:g} nodes and ended with {last:g}. Answers, pairs, codes and adapter are {same} "
            f"to those of {WORKERS} workers on one host of a fixed size.",
            "",
            f"![demand, nodes and completions over time]({plotted})",
            "",
            "| seconds | what |",
            "|---:|---|",
            *table,
            "",
        ]
    )


def _sentence(what: str) -> str:
    nodes = {
        "asked": "the autoscaler asks for a node",
        "joined": "a node has joined",
        "stopped": "the autoscaler has stopped a node",
        "lost": "a node was lost",
    }
    return nodes.get(what, what)


if __name__ == "__main__":
    main()
