"""Hands figures to Ray, whose nodes export them for Prometheus (Ray prefixes names by `ray_`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from qresafe.metrics import METRICS, SECONDS, send_to


class RaySink:
    """The metrics of this process, each made when it is first recorded."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __call__(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        """Hand a figure on; labels that the metric does not have are left out."""
        if name not in self._made:
            self._made[name] = _make(name)
        made, kind = self._made[name], METRICS[name].kind
        given = {label: labels[label] for label in METRICS[name].labels}
        if kind == "gauge":
            made.set(value, given)
        elif kind == "histogram":
            made.observe(value, given)
        elif value > 0:  # Ray refuses to count nothing
            made.inc(value, given)


def send_to_ray() -> None:
    """Have what this process records exported by its Ray node."""
    send_to(RaySink())


def _make(name: str) -> Any:
    metric = METRICS[name]
    told = {"description": metric.meaning, "tag_keys": metric.labels}
    if metric.kind == "histogram":
        return Histogram(name, boundaries=list(SECONDS), **told)
    return (Counter if metric.kind == "counter" else Gauge)(name, **told)
