"""A patch as small as it can be, and what it makes: what runs on several hosts are compared by."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from upath import UPath

ROOT = Path(__file__).parents[1]
# Every stage up to the patch: quantize, W's and Q0's answers, pairs, patch.
SETTINGS = ["quantize.steps=2", "pairs.harmful=16", "pairs.benign=4", "pairs.recombined=4"]
SETTINGS += ["pairs.borderline=0", "pairs.max_new_tokens=16", "pairs.batch_size=4"]
SETTINGS += ["patch.steps=4", "patch.lr=0.01", "patch.checkpoint_every=1", "control=false"]
SETTINGS += ["patch.zero_stage=0"]  # DeepSpeed takes seconds to import
RESULTS = {"completions.parquet", "pairs.parquet", "codes.safetensors", "adapter.safetensors"}


def command(
    storage: Path | str,
    *,
    workers: int,
    address: str | None = None,
    settings: Sequence[str] = SETTINGS,
) -> list[str]:
    """Return the patch's command; `address` is that of a cluster to join."""
    joined = [f"resources.address={address}"] if address else []
    words = ["patch", "cpu-smoke", "--json", "--workers", str(workers), "--storage", str(storage)]
    words += [word for setting in (*settings, *joined) for word in ("--set", setting)]
    return [sys.executable, "-m", "qresafe.cli", *words]


def on_one_host(workers: int) -> dict[str, bytes]:
    """Return what that many workers make on one host, which has a CPU for each."""
    from tests.cluster.namespaces import Hosts

    with Hosts(1) as hosts:
        address, storage = hosts.start_head(cpus=workers), hosts.folder / "storage"
        ended = hosts.run(0, command(storage, workers=workers, address=address), cwd=ROOT)
        if ended.returncode:
            raise RuntimeError(ended.stderr)
        return results(UPath(storage))


def results(storage: UPath) -> dict[str, bytes]:
    """Return what a run made, by kind, key and file: answers, pairs, codes and adapter."""
    found = [path for path in storage.rglob("*") if path.name in RESULTS]
    return {"/".join(path.parts[-3:]): path.read_bytes() for path in found}


def seconds(answer: dict[str, Any]) -> dict[str, float]:
    """Return each stage's seconds from what `--json` printed."""
    return {stage["name"]: stage["seconds"] for stage in answer["stages"]}
