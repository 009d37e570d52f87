"""A table filled in: every row's figures, seed by seed, kept as JSON beside its page."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from qresafe.errors import ResourceError, UserError
from qresafe.progress import Progress
from qresafe.specs import ExperimentSpec
from qresafe.stages.experiment import Experiment
from qresafe.stages.reproduce.measure import figures
from qresafe.stages.reproduce.mt_bench import MtBench
from qresafe.stages.reproduce.plan import PlannedArm
from qresafe.stages.runtime import Runtime
from qresafe.stages.seeds import with_seed
from qresafe.variants import with_changes


class FilledRow(BaseModel):
    """One row with one seed.

    Attributes:
        title: The row.
        seed: Of all stages, and of the embedded W.
        figures: Cell -> value and n, as in `measure.Figure`; absent: there is none.
        refused: Why the row could not be measured, in the project's own words.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    seed: int
    figures: dict[str, tuple[float, int]] = {}
    refused: str = ""


def filled(
    arms: Sequence[PlannedArm],
    seed: int,
    name: str,
    runtime: Runtime,
    progress: Progress,
    mt_bench: MtBench | None = None,
) -> list[FilledRow]:
    """Measure every row of a table with one seed, in one run, so that rows share their stages.

    Args:
        arms: The table's rows.
        seed: Of quantization, pairs and patch, and of the embedded W.
        name: Of the run.
        runtime: Where stages run.
        progress: Shows them.
        mt_bench: What grades MT-Bench; None: its cells stay empty.
    """
    place = seed, name, runtime, progress
    return [_row(planned, *place, mt_bench) for planned in arms]


def run_name(preset: str, seed: int) -> str:
    """Return the name of the run that holds a preset's stages of one seed."""
    return f"reproduce-{preset}-seed{seed}"


def experiment_of(
    spec: ExperimentSpec, seed: int, name: str, runtime: Runtime, progress: Progress
) -> Experiment:
    """Return a row's experiment with a seed, in the run `name`."""
    return Experiment(
        with_changes(with_seed(spec, seed, progress), {"name": name}), runtime, progress
    )


def _row(
    planned: PlannedArm,
    seed: int,
    name: str,
    runtime: Runtime,
    progress: Progress,
    mt_bench: MtBench | None,
) -> FilledRow:
    title = planned.arm.title
    if planned.spec is None:
        return FilledRow(title=title, seed=seed, refused=planned.absent)
    try:
        experiment = experiment_of(planned.spec, seed, name, runtime, progress)
        experiment.check()
        found = figures(experiment, planned.cells, mt_bench)
    except ResourceError:  # a full disk would cost every row that follows
        raise
    except UserError as error:  # one row that cannot be measured does not cost the others
        return FilledRow(title=title, seed=seed, refused=str(error))
    kept = {cell: (one.value, one.n) for cell, one in found.items()}
    return FilledRow(title=title, seed=seed, figures=kept)
