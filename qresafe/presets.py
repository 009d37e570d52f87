"""Experiments by name: a YAML file's path, or the name of a packaged preset."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

from qresafe.errors import SpecError, nearest
from qresafe.loading import load_spec
from qresafe.specs import ExperimentSpec

_FOLDER = Path(str(files("ray_jobs"))) / "presets"


def preset_names() -> tuple[str, ...]:
    """Return the names that `load_experiment` accepts instead of a path."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


def load_experiment(config: str | None, overrides: Iterable[str] = ()) -> ExperimentSpec:
    """Load an experiment from a YAML file's path or a preset's name.

    Args:
        config: "my.yaml", "configs/my.yml", a preset such as "demo", or None for the defaults.
        overrides: Dotted `key=value` strings, applied last; values are YAML.

    Raises:
        SpecError: There is no such file or preset, or its content is not a valid experiment.
    """
    return load_spec(ExperimentSpec, _locate(config) if config else None, overrides)


def _locate(config: str) -> Path:
    preset = _FOLDER / f"{config}.yaml"
    if config in preset_names():
        return preset
    path = Path(config)
    if path.suffix not in {".yaml", ".yml"} and not path.is_file():
        remedy = f"{nearest(config, preset_names())} (or give the path of a YAML file)"
        raise SpecError(f"no preset named {config!r}", remedy=remedy)
    return path
