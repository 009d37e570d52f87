"""An experiment with another seed."""

from __future__ import annotations

from typing import Any

from qresafe.embedded.build import embedded_model_path
from qresafe.progress import Progress
from qresafe.specs import ExperimentSpec
from qresafe.variants import with_changes


def with_seed(spec: ExperimentSpec, seed: int, progress: Progress | None = None) -> ExperimentSpec:
    """Return the experiment with one seed for quantization (if it has one), pairs and patch.

    For the embedded model it is W's seed too: the model of that seed is built if it is not there.

    Args:
        spec: Any experiment.
        seed: The seed.
        progress: Shows the steps of a build.
    """
    seeds: dict[str, Any] = {"pairs": {"seed": seed}, "patch": {"seed": seed}}
    if hasattr(spec.quantize, "seed"):
        seeds["quantize"] = {"seed": seed}
    if spec.model.path == "embedded":
        seeds["model"] = {"path": str(embedded_model_path(seed, progress))}
    return with_changes(spec, seeds)
