"""lm-evaluation-harness through its own API; an optional extra, imported when it is asked for."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from typing import Any

from qresafe.errors import ResourceError, SpecError
from qresafe.hf.models import ModelRef, load_model, load_tokenizer

PACKAGE = "lm_eval"


def harness_version() -> str:
    """Return the installed harness's version.

    Raises:
        ResourceError: It is not installed.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        remedy = "pip install 'qresafe[harness]'"
        raise ResourceError("lm-evaluation-harness is not installed", remedy=remedy)
    return importlib.metadata.version(PACKAGE)


def evaluate(
    ref: ModelRef,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    device: str = "cpu",
    chat: bool = True,
    include: str | None = None,
) -> dict[str, dict[str, float]]:
    """Evaluate a model on tasks of the harness.

    Args:
        ref: The model.
        tasks: Names of tasks or groups.
        limit: The first so many documents of each task; None: all.
        batch_size: Documents per forward pass.
        device: A torch device.
        chat: Put prompts into the model's chat template.
        include: A folder with task files of your own.

    Returns:
        Task -> metric ("acc,none", "acc_stderr,none", ...) -> value; groups included.

    Raises:
        ResourceError: The harness is not installed.
        SpecError: A task is not known.
    """
    harness_version()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        remedy = "list the names with `lm-eval ls tasks`"
        raise SpecError(f"lm-evaluation-harness has no task {unknown[0]!r}", remedy=remedy)
    place = ref.on_this_machine()
    trust = place.trust_remote_code
    # By name the harness would leave out what lies beside a checkpoint: weights kept in 16 bits.
    model = load_model(place.path, dtype=place.dtype, device=device, trust_remote_code=trust)
    tokenizer = load_tokenizer(place.path, trust_remote_code=trust, chat=chat)
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=list(tasks),
        limit=limit,
        apply_chat_template=chat,
        task_manager=manager,
        log_samples=False,
    )
    return {task: _numbers(values) for task, values in found["results"].items()}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {name: float(v) for name, v in values.items() if isinstance(v, int | float)}
