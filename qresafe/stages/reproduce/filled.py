"""A table filled in: every row's figures, seed by seed, kept as JSON beside its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from qresafe.errors import UserError
from qresafe.progress import Progress
from qresafe.stages.experiment import Experiment
from qresafe.stages.reproduce.measure import Figure, figure
from qresafe.stages.reproduce.plan import PlannedArm
from qresafe.stages.runtime import Runtime
from qresafe.stages.seeds import with_seed
from qresafe.variants import with_changes


class FilledRow(BaseModel):
    """One row with one seed.

    Attributes:
        title: The row.
        seed: Of all stages, and of the embedded W.
        figures: Cell -> (value, n) as in `measure.Figure`; absent: there is none.
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
    run: Mapping[str, str],
    runtime: Runtime,
    progress: Progress,
) -> list[FilledRow]:
    """Measure every row of a table with one seed, in one run, so that rows share their stages.

    Args:
        arms: The table's rows.
        seed: Of quantization, pairs and patch, and of the embedded W.
        run: The `name` and `storage` of the run.
        runtime: Where stages run.
        progress: Shows them.
    """
    return [_row(planned, seed, run, runtime, progress) for planned in arms]


def run_name(preset: str, seed: int) -> str:
    """Return the name of the run that holds a preset's stages of one seed."""
    return f"reproduce-{preset}-seed{seed}"


def _row(
    planned: PlannedArm, seed: int, run: Mapping[str, str], runtime: Runtime, progress: Progress
) -> FilledRow:
    title = planned.arm.title
    if planned.spec is None:
        return FilledRow(title=title, seed=seed, refused=planned.absent)
    try:
        spec = with_changes(with_seed(planned.spec, seed, progress), run)
        experiment = Experiment(spec, runtime, progress)
        experiment.check()
        found = {cell: figure(experiment, cell) for cell in planned.cells}
    except UserError as error:  # one row that cannot be measured does not cost the others
        return FilledRow(title=title, seed=seed, refused=str(error))
    return FilledRow(title=title, seed=seed, figures={c: _pair(f) for c, f in found.items() if f})


def _pair(found: Figure) -> tuple[float, int]:
    return found.value, found.n
