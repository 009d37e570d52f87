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
        if quantize.get("method", data["quantize"]["method"]) != data["quantize"]["method"]:
            data["quantize"] = {}
        elif "risk" in (quantize.get("calibration") or {}):
            data["quantize"].pop("calibration", None)
    return load_spec(ExperimentSpec, merged(data, changes))
