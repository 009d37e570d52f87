"""What a search finds and what it costs, on the embedded model: docs/results-search.md.

    python -m bench.search                       # everything, about 80 minutes on two quiet cores
    python -m bench.search --only kills          # one of: best, asha, kills, overhead
    python -m bench.search --only best --set budget.trials=4    # small, to try it; writes no page

Each piece continues where it was stopped, and the page is written from the pieces that are there:
    best      32 trials over seven keys, the winner confirmed on the test split with three seeds
    asha      the same 16 random trials with and without successive halving
    kills     a small search whose driver is killed five times, against one left alone
    overhead  a trial as a Ray Train run, against one in Tune's own process
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from qresafe.search_spec import Search, load_search
from qresafe.stages.search.folder import CONFIRMATION, SESSIONS, TRIALS, search_folder
from qresafe.stages.search.ledger import Ledger, Row
from qresafe.stages.search.selection import winner

PAGE = Path(__file__).parents[1] / "docs" / "results-search.md"
KILLS = 5
TIMED = ("seconds", "trial_seconds")
SMALL = ["patch.steps=20", "budget.trials=8", "probe.every=5", "confirm=[]",
         "patch.checkpoint_every=1", "pairs.recombined=200", "pairs.benign=100"]  # fmt: skip
ASHA = ["searcher.name=random", "budget.trials=16", "confirm=[]"]
Found = dict[str, Any]


def main() -> None:
    """Measure what is asked for and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=list(PIECES), default=list(PIECES))
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the searches")
    parser.add_argument("--storage", default=".bench/search")
    args = parser.parse_args()
    folder = Path(args.storage).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for piece in args.only:
        found = PIECES[piece](folder, args.set)
        print(json.dumps({piece: found}, indent=1), flush=True)
        if not args.set:
            (folder / f"{piece}.json").write_text(json.dumps(found, indent=1))
    if not args.set:
        from bench.search_page import page

        known = {p: folder / f"{p}.json" for p in PIECES}
        PAGE.write_text(
            page({p: json.loads(f.read_text()) for p, f in known.items() if f.exists()})
        )


def best(folder: Path, overrides: Sequence[str]) -> Found:
    """Search for something better than the default spec; confirm it on the test split."""
    search = run(folder, "best", ["budget.trials=32", *overrides])
    rows = rows_of(search)
    chosen = winner(rows, search.spec)
    place = search_folder(search)
    confirmed = place / CONFIRMATION
    return {
        "search": search.key,
        "rows": [row.model_dump(mode="json", exclude={"curve"}) for row in rows],
        "winner": chosen.index if chosen else None,
        "confirmation": json.loads(confirmed.read_text()) if confirmed.exists() else [],
        "objectives": [[o.metric, o.weight] for o in search.spec.objectives],
        "sessions": sessions(search),
        "stages": stages(search),
    }


def asha(folder: Path, overrides: Sequence[str]) -> Found:
    """Run the same random trials with and without ASHA, each in a folder of its own."""
    found = {}
    for name, rule in (("all", "none"), ("asha", "asha")):
        rules = [f"scheduler.name={rule}", "scheduler.grace=20", "scheduler.factor=2"]
        search = run(folder, f"asha-{name}", [*ASHA, *rules, *overrides])
        rows = rows_of(search)
        chosen = winner(rows, search.spec)
        found[name] = {
            "trials": len(rows),
            "stopped": sum(row.status == "stopped" for row in rows),
            "steps": sum(row.metrics.get("steps", 0.0) for row in rows if row.same_as is None),
            "winner": chosen.index if chosen else None,
            "metrics": chosen.metrics if chosen else {},
            "sessions": sessions(search),
        }
    return found


def kills(folder: Path, overrides: Sequence[str]) -> Found:
    """Kill a search's driver at random moments, and compare its table with an undisturbed one."""
    alone = run(folder, "alone", [*SMALL, *overrides])
    settings = [*SMALL, *overrides]
    search = loaded(folder, "killed", settings)
    shutil.rmtree(folder / "runs" / "killed", ignore_errors=True)  # of an earlier measurement
    draw, moments = random.Random(0), []
    whole = sum(session["seconds"] for session in sessions(alone))
    while len(moments) < KILLS:
        driver = start(folder, "killed", settings)
        wait_for_row(search, driver)
        time.sleep(draw.uniform(0, whole / 8))
        if driver.poll() is not None:
            break  # it had ended before it could be killed
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        moments.append(len(rows_of(search)))
        print(f"killed with {moments[-1]} rows", flush=True)
    run(folder, "killed", settings, "--resume")
    tables = [untimed(one) for one in (alone, search)]
    return {"killed_with_rows": moments, "trials": len(tables[0]), "equal": tables[0] == tables[1]}


def overhead(folder: Path, overrides: Sequence[str]) -> Found:
    """Time the same trials in Tune's own processes, and as Ray Train runs with one worker."""
    few = ["budget.trials=4", "searcher.name=random", "confirm=[]", "probe.every=100"]
    found = {}
    for name, workers in (("process", 0), ("train", 1)):
        own = [f"resources.workers={workers}", "patch.zero_stage=0"]
        search = run(folder, f"overhead-{name}", [*few, *own, *overrides])
        steps = sum(row.metrics["seconds"] for row in rows_of(search))
        found[name] = {"sessions": sessions(search), "training_seconds": round(steps, 1)}
    return found


PIECES: dict[str, Callable[[Path, Sequence[str]], Found]] = {
    "best": best,
    "asha": asha,
    "kills": kills,
    "overhead": overhead,
}


def loaded(folder: Path, name: str, settings: Sequence[str]) -> Search:
    """Return a search of tune_spaces/embedded.yaml with settings."""
    return load_search("embedded", [*settings, f"name={name}"]).at(str(folder))


def run(folder: Path, name: str, settings: Sequence[str], *options: str) -> Search:
    """Run a search to its end in a process of its own, or continue it."""
    driver = start(folder, name, settings, *options)
    if driver.wait():
        sys.exit(f"search {name} ended with code {driver.returncode}: see {folder}/{name}.log")
    return loaded(folder, name, settings)


def start(
    folder: Path, name: str, settings: Sequence[str], *options: str
) -> subprocess.Popen[bytes]:
    """Start `qresafe search`; its output goes to a log beside the results."""
    sets = [word for text in settings for word in ("--set", text)]
    command = [sys.executable, "-m", "qresafe.cli", "search", "embedded", "--storage", str(folder)]
    with open(folder / f"{name}.log", "ab") as log:
        return subprocess.Popen(
            [*command, "--name", name, *sets, *options],
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # equal bits need equal thread counts
        )


def wait_for_row(search: Search, driver: subprocess.Popen[bytes]) -> None:
    """Wait until one more trial has ended, or the driver has."""
    before = len(rows_of(search))
    while len(rows_of(search)) == before and driver.poll() is None:
        time.sleep(0.05)


def rows_of(search: Search) -> list[Row]:
    """Return a search's rows."""
    return list(Ledger(search_folder(search)).read().values())


def sessions(search: Search) -> list[Found]:
    """Return where each run of Tune spent its time."""
    lines = (search_folder(search) / SESSIONS).read_text().splitlines()
    return [session for session in map(json.loads, lines) if session["trials"]]


def stages(search: Search) -> dict[str, dict[str, float]]:
    """Return how often each stage was computed in a search's run, and its seconds in all."""
    found: dict[str, dict[str, float]] = {}
    root = Path(search.validation.storage) / "runs" / search.validation.name
    for path in sorted(root.glob("*/*/manifest.json")):
        seconds = json.loads(path.read_text())["seconds"]
        stage = found.setdefault(path.parts[-3], {"count": 0, "seconds": 0.0})
        stage["count"] += 1
        stage["seconds"] = round(stage["seconds"] + seconds, 1)
    return found


def untimed(search: Search) -> list[Found]:
    """Return a search's table without the columns that are times."""
    table = pq.read_table(str(search_folder(search) / TRIALS))
    return table.drop_columns([n for n in TIMED if n in table.column_names]).to_pylist()


if __name__ == "__main__":
    main()
