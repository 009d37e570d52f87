"""Early stopping against Ray's own schedulers: the same decisions where trials run in turn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler

from qresafe.search_spec import SchedulerSpec
from qresafe.stages.search.rules import stops

STEPS = range(10, 101, 10)


class Trial:
    """What Ray's schedulers look at of a trial."""

    def __init__(self, index: int) -> None:
        self.trial_id = str(index)


def falling_curves(seed: int, count: int) -> list[dict[int, float]]:
    """Return noisy falling curves in [0, 1], rounded so that there are ties."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        end, speed = draw.random(), 10 ** draw.uniform(-2, -1)
        values = end + (1 - end) * np.exp(-speed * np.array(STEPS)) + 0.1 * draw.normal(size=10)
        found.append(dict(zip(STEPS, np.round(values, 2).tolist(), strict=True)))
    return found


class Alone:
    """A controller in which nothing else is waiting."""

    def get_live_trials(self) -> list[Any]:
        return []


def by_ray(scheduler: Any, curves: list[dict[int, float]]) -> list[int]:
    """Return the step that each trial got to, one trial after the other."""
    ends = []
    for index, curve in enumerate(curves):
        trial = Trial(index)
        scheduler.on_trial_add(None, trial)
        for step, value in curve.items():
            result = {"step": step, "asr": value}
            said = scheduler.on_trial_result(Alone(), trial, result)
            if said == TrialScheduler.STOP:
                break
        ends.append(step)
    return ends


def by_us(rule: SchedulerSpec, curves: list[dict[int, float]]) -> list[int]:
    peers: list[dict[int, float]] = []
    for curve in curves:
        seen: dict[int, float] = {}
        for step, value in curve.items():
            seen[step] = value
            if stops(rule, seen, peers):
                break
        peers.append(seen)
    return [max(seen) for seen in peers]


@pytest.mark.parametrize("seed", range(6))
def test_asha_is_rays_asha(seed: int) -> None:
    curves = falling_curves(seed, 24)
    theirs = AsyncHyperBandScheduler(
        "step", "asr", "min", max_t=101, grace_period=10, reduction_factor=3
    )
    ours = by_us(SchedulerSpec(name="asha", grace=10, factor=3), curves)
    assert ours == by_ray(theirs, curves)
    assert min(ours) < max(ours)  # some were stopped, some were not


@pytest.mark.parametrize("seed", range(6))
def test_the_median_rule_is_rays(seed: int) -> None:
    curves = falling_curves(seed, 24)
    theirs = MedianStoppingRule("step", "asr", "min", grace_period=30, min_samples_required=3)
    ours = by_us(SchedulerSpec(name="median", grace=30, min_peers=3), curves)
    assert ours == by_ray(theirs, curves)
    assert min(ours) < max(ours)


def test_asha_by_hand() -> None:
    rule = SchedulerSpec(name="asha", grace=20, factor=2)  # rungs 20, 40, 80
    peers = [{20: 0.1, 40: 0.1}, {20: 0.5}, {20: 0.9}]
    assert stops(rule, {10: 1.0}, peers) is None  # before the first rung
    assert stops(rule, {20: 0.5}, peers) is None  # the median of .1 .5 .9 is the cutoff
    said = stops(rule, {20: 0.6}, peers)
    assert said == "asha: 0.6 at step 20 is above 0.5"
    assert stops(rule, {20: 0.5, 30: 1.0}, peers) is None  # between two rungs
    assert stops(rule, {20: 0.5, 40: 0.2}, peers) is not None  # above .1, the only one at 40
    assert stops(rule, {20: 1.0}, []) is None
    assert stops(SchedulerSpec(), {20: 1.0}, peers) is None
