"""What the cluster's autoscaler, if it has one, is asked for, and what it makes of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.experimental.internal_kv import _internal_kv_get

# A demand that an autoscaler saw and started nothing for, for so long, cannot be met. It looks
# every five seconds, and tries a failed start again.
PATIENCE_SECONDS = 30


@contextmanager
def demanded(bundle: Mapping[str, float], count: int) -> Iterator[None]:
    """Ask for room for `count` bundles meanwhile; the autoscaler sees no demand from waiting."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[dict(bundle)] * count)
    try:
        yield
    finally:
        request_resources(bundles=[])


def is_idle(bundle: Mapping[str, float], count: int) -> bool:
    """Return whether the autoscaler has seen this demand, and there is no worker for it to come.

    False while any worker node is alive: it may count towards the most nodes, and end. False too
    where nobody says: a cluster without autoscaler, or one whose state is kept by KubeRay.
    """
    text = _internal_kv_get(DEBUG_AUTOSCALING_STATUS)
    status = json.loads(text) if text else {}
    report = status.get("autoscaler_report")
    if not report:
        return False
    seen = [dict(bundle), count] in status["load_metrics_report"]["request_demand"]
    coming = report["pending_launches"] or report["pending_nodes"]
    return bool(seen and not coming and sum(report["active_nodes"].values()) <= 1)
