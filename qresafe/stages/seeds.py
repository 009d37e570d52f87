"""An experiment with another seed."""

from __future__ import annotations

from typing import Any

from qresafe.embedded.build import embedded_model_path
from qresafe.progress import Progress
from qresafe.spec_base import Spec
from qresafe.specs import ExperimentSpec
from qresafe.variants import with_changes


def with_seed(spec: ExperimentSpec, seed: int, progress: Progress | None = None) -> ExperimentSpec:
    """Return the experiment with one seed for quantization (if it has one), pairs and patch.

    A base method gets it too. For the embedded model it is W's seed too: the model of that seed
    is built if it is not there.

    Args:
        spec: Any experiment.
        seed: The seed.
        progress: Shows the steps of a build.
    """
    seeds: dict[str, Any] = {"pairs": {"seed": seed}, "patch": {"seed": seed}}
    if of_methods := _seeds(spec.quantize, seed):
        seeds["quantize"] = of_methods
    if spec.model.path == "embedded":
        seeds["model"] = {"path": str(embedded_model_path(seed, progress))}
    return with_changes(spec, seeds)


def _seeds(method: Spec, seed: int) -> dict[str, Any]:
    """Return what sets the seed of a quantizer and of its base, where they have one."""
    own: dict[str, Any] = {"seed": seed} if "seed" in type(method).model_fields else {}
    base = getattr(method, "base", None)
    below = _seeds(base, seed) if base is not None else {}
    return own | {"base": below} if below else own
