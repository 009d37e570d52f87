"""A whole experiment's artefacts made by hand, with figures like a real one's; for the report.

`python tests/stages/fabricated_experiment.py FOLDER` writes its report there, to look at.
"""

from __future__ import annotations

import json
import math
import random
import sys
from typing import Any

from fabricated import GIBBERISH, REFUSAL, arm, row

from qresafe.artifacts import Artifact, Run, write_text
from qresafe.progress import Silent
from qresafe.specs import ExperimentSpec
from qresafe.stages.compare import compare
from qresafe.stages.report import ReportInput, report

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)> & \u202eright to left\u202c'
DELIVERS = "Step one: gather what you need. Step two: put it together slowly."
HELPS = "Use a small brush, begin at the edge and let it dry before the second coat."
# arm -> share of harmful answered, borderline refused, benign right, gibberish
SHARES = {
    "W": (0.01, 0.13, 0.95, 0.0),
    "control": (0.72, 0.02, 0.97, 0.0),
    "Q0": (0.88, 0.01, 0.96, 0.02),
    "Q": (0.015, 0.12, 0.95, 0.005),
    "adapter": (0.01, 0.11, 0.955, 0.0),
}


def rows_of(label: str, count: int) -> list[dict[str, Any]]:
    """Return `count` completions per axis with about the shares of `SHARES`."""
    complied, refused, right, garbled = SHARES[label]
    chance = random.Random(label)
    rows = []
    for i in range(count):
        bad = GIBBERISH if chance.random() < garbled else None
        harmful = DELIVERS if chance.random() < complied else REFUSAL
        borderline = REFUSAL if chance.random() < refused else HELPS
        benign = HELPS if chance.random() < right else "Use a brush and let it dry."
        if i == 3:
            borderline = HOSTILE
        kind = {"benchmark": "embedded", "category": f"kind {i % 3}"}
        rows.append(row("harmful", i, bad or harmful, **kind, lang="en" if i % 2 else "de"))
        rows.append(row("borderline", i, borderline, **kind))
        scored = kind | {"target": HELPS, "target_logp": -9.0 * (2 - right), "target_tokens": 17}
        rows.append(row("benign", i, bad or benign, **scored))
    return sorted(rows, key=lambda one: one["axis"])


def _stage(run: Run, name: str, counts: dict[str, Any], files: dict[str, str]) -> Artifact:
    def work(folder: Any) -> dict[str, Any]:
        for file, text in files.items():
            write_text(folder / file, text)
        return counts

    return run.stage(name, spec={}, inputs={}, code_version=1, work=work)


def _history() -> str:
    records: list[dict[str, Any]] = []
    for step in range(1, 71):
        kl = 0.9 * math.exp(-step / 15) + 0.05
        record: dict[str, Any] = {"step": step, "loss": kl, "parts": {"kl": kl}, "lr": 5e-4}
        if step % 14 == 1:
            overlap = None if step == 1 else 0.7 + step / 300
            record["mask"] = {"version": 1 + step // 14, "overlap": overlap, "active": 0.6}
        records.append(record)
    return "".join(json.dumps(record) + "\n" for record in records)


def _export_counts() -> dict[str, Any]:
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    chance = random.Random(0)
    names = [
        f"model.layers.{block}.{'self_attn' if i < 4 else 'mlp'}.{kind}"
        for block in range(4)
        for i, kind in enumerate(kinds)
    ]
    sizes = {name: 16384 if "self_attn" in name else 45056 for name in names}
    changed = {name: int(size * chance.uniform(0.005, 0.06)) for name, size in sizes.items()}
    total, all_changed = sum(sizes.values()), sum(changed.values())
    return {
        "codes": total,
        "codes_changed": all_changed,
        "fraction_changed": all_changed / total,
        "changed_by_layer": changed,
        "codes_by_layer": sizes,
        "patch_bytes": 2 * all_changed + 4000,
        "bytes_per_changed_code": 2.0,
        "checkpoint_bytes": 1_240_000,
        "scales": 12_288,
        "scales_changed": 7_654,
    }


def fabricate(run: Run, count: int = 40, labels: tuple[str, ...] = tuple(SHARES)) -> ReportInput:
    """Return what a report is made of."""
    arms = {label: arm(run, label, rows_of(label, count)) for label in labels}
    patch = _stage(run, "patch", {"steps": 70}, {"history.jsonl": _history()})
    export = _stage(run, "export", _export_counts(), {})
    comparison = compare(run, arms, Silent())
    stages = [(f"generate {label}", pair[0]) for label, pair in arms.items()]
    stages += [("patch", patch), ("export", export), ("compare", comparison)]
    spec = ExperimentSpec(name="demo").model_dump(mode="json")
    return ReportInput(spec, comparison, arms, stages, patch, export)


if __name__ == "__main__":
    made_run = Run(sys.argv[1], "fabricated")
    print(report(made_run, fabricate(made_run, 240), Silent()).path)
