"""Variants of an experiment: some keys changed, all others as they were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qresafe.loading import load_spec, merged
from qresafe.specs import ExperimentSpec


def with_changes(base: ExperimentSpec, changes: Mapping[str, Any]) -> ExperimentSpec:
    """Return an experiment with some keys set.

    Where a change makes others meaningless, these begin at their defaults: another quantizer has
    other keys, and another risk level other sizes.

    Args:
        base: Any experiment.
        changes: Nested like the spec; a mapping changes only the keys that it names.

    Raises:
        SpecError: A key is unknown or a value is not accepted.
    """
    data = base.model_dump(mode="json")
    quantize = changes.get("quantize")
    if isinstance(quantize, Mapping):
        _leave_others(data["quantize"], quantize)
    return load_spec(ExperimentSpec, merged(data, changes))


def _leave_others(held: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Drop a quantizer's keys that `changes` makes meaningless, and those of its base method."""
    if changes.get("method", held["method"]) != held["method"]:
        held.clear()
    if "risk" in (changes.get("calibration") or {}):
        held.pop("calibration", None)
    if isinstance(base := changes.get("base"), Mapping) and "base" in held:
        _leave_others(held["base"], base)
