"""A patch and an experiment as small as they can be: what runs on several hosts are compared by."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

from upath import UPath

ROOT = Path(__file__).parents[1]
TIMEOUT = 3600.0
# Every stage up to the patch: quantize, W's and Q0's answers, pairs, patch.
SETTINGS = ["quantize.steps=2", "pairs.harmful=16", "pairs.benign=4", "pairs.recombined=4"]
SETTINGS += ["pairs.borderline=0", "pairs.max_new_tokens=16", "pairs.batch_size=4"]
SETTINGS += ["patch.steps=4", "patch.lr=0.01", "patch.checkpoint_every=1", "control=false"]
SETTINGS += ["patch.zero_stage=0"]  # DeepSpeed takes seconds to import
RESULTS = {"completions.parquet", "pairs.parquet", "codes.safetensors", "adapter.safetensors"}
# The rest of an experiment: three prompts per axis, an attack's few configurations not among it.
WHOLE = [
    *SETTINGS,
    "evaluate.generate.max_new_tokens=8",
    "evaluate.prompts="
    + json.dumps(
        [
            {"axis": axis, "split": "test", "limit": 3}
            for axis in ("harmful", "benign", "borderline")
        ]
    ),
]
WHOLE_RESULTS = RESULTS | {"verdicts.parquet", "comparison.json", "patch.qpatch"}


def command(
    storage: Path | str,
    *,
    workers: int,
    address: str | None = None,
    settings: Sequence[str] = SETTINGS,
    whole: bool = False,
) -> list[str]:
    """Return the command of the patch, or of the whole experiment.

    Args:
        storage: Where the run goes.
        workers: How many.
        address: Of a cluster to join.
        settings: `--set` options.
        whole: Go on to the report.
    """
    joined = [f"resources.address={address}"] if address else []
    words = [
        "run" if whole else "patch",
        "cpu-smoke",
        "--json",
        "--workers",
        str(workers),
        "--storage",
        str(storage),
    ]
    words += [word for setting in (*settings, *joined) for word in ("--set", setting)]
    return [sys.executable, "-m", "qresafe.cli", *words]


def on_one_host(
    workers: int, settings: Sequence[str] = SETTINGS, *, whole: bool = False
) -> dict[str, bytes]:
    """Return what that many workers make on one host, which has a CPU for each."""
    from tests.cluster.namespaces import Hosts

    with Hosts(1) as hosts:
        address, storage = hosts.start_head(cpus=workers), hosts.folder / "storage"
        words = command(storage, workers=workers, address=address, settings=settings, whole=whole)
        ended = hosts.run(0, words, cwd=ROOT, timeout=TIMEOUT)
        if ended.returncode:
            raise RuntimeError(ended.stderr)
        return results(UPath(storage), WHOLE_RESULTS if whole else RESULTS)


def results(storage: UPath, names: Set[str] = RESULTS) -> dict[str, bytes]:
    """Return what a run made of files of these names, by kind, key and file."""
    found = [path for path in storage.rglob("*") if path.name in names]
    return {"/".join(path.parts[-3:]): path.read_bytes() for path in found}


def seconds(answer: dict[str, Any]) -> dict[str, float]:
    """Return each stage's seconds from what `--json` printed."""
    return {stage["name"]: stage["seconds"] for stage in answer["stages"]}
