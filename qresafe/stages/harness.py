"""The stage that runs tasks of lm-evaluation-harness on a model, for utility."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from upath import UPath

from qresafe.artifacts import Artifact, Run, write_text
from qresafe.hf.harness import evaluate, harness_version
from qresafe.hf.warm import ModelInput
from qresafe.progress import Progress

CODE_VERSION = 1
FILE = "results.json"


def harness(
    run: Run,
    *,
    label: str,
    model: ModelInput,
    tasks: Sequence[str],
    limit: int | None,
    include: str | None,
    progress: Progress,
) -> Artifact:
    """Evaluate a model on tasks; results.json holds task -> metric -> value.

    Args:
        run: Where the result goes.
        label: What the model is called in the display.
        model: The model.
        tasks: Names of the harness's tasks.
        limit: The first so many documents of each.
        include: A folder with tasks of your own. Its content is not part of the key.
        progress: Told when it is done.

    Raises:
        ResourceError: The harness is not installed.
        SpecError: A task is not known.
    """

    def work(folder: UPath) -> Mapping[str, Any]:
        import torch

        progress.start(f"lm-eval {label}")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        found = evaluate(model.ref, tasks, limit=limit, device=device, include=include)
        write_text(folder / FILE, json.dumps(found, indent=1))
        progress.finish(f"{len(found)} tasks")
        return {"results": found}

    return run.stage(
        "lm_eval",
        spec={"tasks": sorted(tasks), "limit": limit, "include": include},
        inputs={"model": model.key, "harness": harness_version()},
        code_version=CODE_VERSION,
        work=work,
    )
