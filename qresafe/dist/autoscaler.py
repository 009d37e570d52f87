"""What the cluster's autoscaler, if it has one, is asked for, and what it makes of it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.experimental.internal_kv import _internal_kv_get

# A demand that an autoscaler saw and started nothing for, for so long, cannot be met. It looks
# every five seconds, and tries a failed start again.
PATIENCE_SECONDS = 30
# A cluster keeps one request only, the last one: another job's replaces ours.
ASK_SECONDS = 5


@contextmanager
def demanded(bundle: Mapping[str, float], count: int) -> Iterator[Callable[[], None]]:
    """Ask for room for `count` bundles meanwhile; the autoscaler sees no demand from waiting.

    Jobs that wait at the same time on one cluster take turns: their demands are not added up. The
    cluster grows to the largest of them, and a demand that cannot be met may be told only after
    `wait_seconds`, as it is not seen all the time.

    Returns:
        What asks again; to be called while waiting, as often as one likes.
    """
    from ray.autoscaler.sdk import request_resources

    asked = -math.inf

    def ask() -> None:
        nonlocal asked
        if (now := time.monotonic()) >= asked + ASK_SECONDS:
            request_resources(bundles=[dict(bundle)] * count)
            asked = now

    ask()
    try:
        yield ask
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
