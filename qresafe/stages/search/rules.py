"""When a trial ends early: asynchronous successive halving and the median rule.

Both are pure functions of the trial's own curve and of its peers', which are trials that had ended
before it began. Ray's schedulers decide the same, but by whatever has been reported so far, so
that their decisions depend on which trial is the faster one; see docs/search.md.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from qresafe.search_spec import SchedulerSpec

Curve = Mapping[int, float]  # step -> probe value, low is good


def stops(rule: SchedulerSpec, curve: Curve, peers: Sequence[Curve]) -> str | None:
    """Return why a trial should end at its last probe, or None if it may go on.

    Args:
        rule: Which rule, with its settings.
        curve: The trial's probes so far, at least one.
        peers: The curves of the trials to compare it with.
    """
    if rule.name == "asha":
        return _asha(rule, curve, peers)
    if rule.name == "median":
        return _median(rule, curve, peers)
    return None


def _asha(rule: SchedulerSpec, curve: Curve, peers: Sequence[Curve]) -> str | None:
    """Li et al. 2020: at each rung, go on only if among the best 1/factor of those there so far."""
    step = max(curve)
    rung = _rung(rule, step)
    if rung is None or any(earlier >= rung for earlier in curve if earlier < step):
        return None  # below the first rung, or past this one before
    there = [value for peer in peers if (value := _value_at(rung, peer)) is not None]
    if not there:
        return None
    cutoff = float(np.percentile(there, 100.0 / rule.factor))
    if curve[step] <= cutoff:
        return None
    return f"asha: {curve[step]:.3g} at step {step} is above {cutoff:.3g}"


def _rung(rule: SchedulerSpec, step: int) -> float | None:
    """Return the highest of grace, grace x factor, grace x factor^2 ... that `step` has reached."""
    if step < rule.grace:
        return None
    rung = float(rule.grace)
    while rung * rule.factor <= step:
        rung *= rule.factor
    return rung


def _value_at(rung: float, curve: Curve) -> float | None:
    reached = [step for step in curve if step >= rung]
    return curve[min(reached)] if reached else None


def _median(rule: SchedulerSpec, curve: Curve, peers: Sequence[Curve]) -> str | None:
    """Golovin et al. 2017: end if the best so far is worse than the median of running means."""
    step = max(curve)
    if step < rule.grace:
        return None
    means = [
        statistics.fmean(value for at, value in peer.items() if rule.grace <= at <= step)
        for peer in peers
        if peer and max(peer) >= step
    ]
    if len(means) < rule.min_peers:
        return None
    median, best = statistics.median(means), min(curve.values())
    if best <= median:
        return None
    return f"median: best {best:.3g} by step {step} is above {median:.3g}"
