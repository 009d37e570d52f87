"""A small search whose trials are made up, for tests of everything around them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from qresafe.search_space import Params
from qresafe.search_spec import Search, load_search
from qresafe.stages.search.ledger import Row
from qresafe.stages.search.queue import Proposal
from qresafe.stages.search.rules import stops

SPACE = {
    "patch.mask.tau": {"loguniform": [0.01, 1.0]},
    "patch.rank": {"choice": [4, 8, 16]},
    "patch.lr": {"loguniform": [1e-4, 1e-2]},
}
STEPS = (20, 40, 60, 80, 100)


def make_search(folder: Path, **changes: Any) -> Search:
    """Write a search's YAML with `changes` and load it."""
    data: dict[str, Any] = {"name": "made-up", "space": SPACE, "budget": {"trials": 12}}
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(data | changes))))
    return load_search(path).at(str(folder / "store"))


def made_up(params: Params) -> dict[str, float]:
    """Return smooth made-up objectives of a trial's values, the same every time."""
    tau, lr = params.get("patch.mask.tau", 0.3), params.get("patch.lr", 5e-4)
    return {
        "attack_success": min(1.0, abs(math.log10(lr) + 3) / 2),
        "over_refusal": float(tau / 2),
        "utility_drop": float(0.01 * params.get("patch.rank", 16) / 16),
        "codes_changed": float(tau / 10),
    }


def ended(search: Search, proposal: Proposal) -> Row:
    """Return the row of a trial: its curve falls towards its value, and the rule may end it."""
    values = made_up(proposal.params)
    metric, curve = search.spec.scheduler.metric, []
    peers = [peer.probed(metric) for peer in proposal.peers if peer.curve]
    for step in STEPS:
        share = values["attack_success"] + (1 - values["attack_success"]) * (1 - step / 100)
        curve.append({"step": float(step), metric: share})
        reason = stops(search.spec.scheduler, {int(c["step"]): c[metric] for c in curve}, peers)
        if reason:
            stopped = {metric: share, "steps": float(step)}
            return Row(index=proposal.index, params=proposal.params, status="stopped",
                       reason=reason, metrics=stopped, curve=curve)  # fmt: skip
    keys = {"patch": f"key-{proposal.index}"}
    return Row(index=proposal.index, params=proposal.params, status="completed",
               metrics=values, curve=curve, keys=keys)  # fmt: skip
