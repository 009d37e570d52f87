"""MLflow, Weights & Biases and TensorBoard, through Ray's own callbacks, when asked for."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from upath import UPath

from qresafe.artifacts import is_local
from qresafe.errors import ResourceError
from qresafe.search_spec import Search, Tracker

PACKAGES: dict[Tracker, str] = {
    "mlflow": "mlflow",
    "wandb": "wandb",
    "tensorboard": "tensorboardX",
}


def check_trackers(search: Search) -> None:
    """Check that what the trackers need is installed.

    Raises:
        ResourceError: A package is missing.
    """
    for name in search.spec.trackers:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            remedy = f"pip install {PACKAGES[name]}, or take {name} out of trackers"
            raise ResourceError(f"{PACKAGES[name]} is not installed", remedy=remedy)


def tracker_callbacks(search: Search, folder: UPath) -> list[Any]:
    """Return the callbacks of the trackers that a search names.

    MLflow's server is MLFLOW_TRACKING_URI; without it, runs go to the search's own folder.
    """
    check_trackers(search)
    made = {"mlflow": _mlflow, "wandb": _wandb, "tensorboard": _tensorboard}
    return [made[name](search, folder) for name in search.spec.trackers]


def _mlflow(search: Search, folder: UPath) -> Any:
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{_own(folder, 'mlflow')}/mlflow.db"
    return MLflowLoggerCallback(tracking_uri=uri, experiment_name=search.spec.name)


def _wandb(search: Search, folder: UPath) -> Any:
    from ray.air.integrations.wandb import WandbLoggerCallback

    return WandbLoggerCallback(project=search.spec.name, dir=str(_own(folder, "wandb")))


def _tensorboard(search: Search, folder: UPath) -> Any:
    from ray.tune.logger import TBXLoggerCallback

    return TBXLoggerCallback()


def _own(folder: UPath, name: str) -> Path:
    if not is_local(folder):
        what = f"{name} without a server keeps its runs in a local folder"
        raise ResourceError(what, where=str(folder), remedy="set MLFLOW_TRACKING_URI")
    own = Path(str(folder)).absolute() / name
    own.mkdir(parents=True, exist_ok=True)
    return own
