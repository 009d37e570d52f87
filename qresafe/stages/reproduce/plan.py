"""From a table and a preset to experiments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from qresafe.errors import SpecError
from qresafe.loading import load_spec, merged
from qresafe.presets import load_experiment
from qresafe.specs import ExperimentSpec
from qresafe.stages.reproduce.tables import PaperArm, PaperTable, ReproducePreset
from qresafe.variants import with_changes

PATCHED = ("Q.", "codes_changed", "hours")


@dataclass(frozen=True)
class PlannedArm:
    """A row of a table and the experiment that fills it.

    Attributes:
        arm: The row.
        cells: What is measured of it.
        spec: The experiment, with its own seeds; None: there is none.
        absent: Why there is none.
    """

    arm: PaperArm
    cells: tuple[str, ...]
    spec: ExperimentSpec | None
    absent: str = ""

    @property
    def patched(self) -> bool:
        """Whether a cell needs the patched model."""
        return any(cell.startswith(PATCHED) for cell in self.cells)


def planned(
    table: PaperTable, preset: ReproducePreset, overrides: Iterable[str] = ()
) -> list[PlannedArm]:
    """Return a table's rows with their experiments.

    Args:
        table: The table.
        preset: The model to answer it with.
        overrides: Dotted `key=value` strings, applied last.

    Raises:
        SpecError: A key or value is not accepted, or a row names what the preset does not know.
    """
    base = with_changes(load_experiment(preset.experiment), preset.changes)
    return list(_arms(table, preset, base, list(overrides)))


def _arms(
    table: PaperTable, preset: ReproducePreset, base: ExperimentSpec, overrides: list[str]
) -> Iterator[PlannedArm]:
    for arm in table.arms:
        cells = arm.only or table.cells
        if arm.quantizer in preset.absent:
            yield PlannedArm(arm, cells, None, preset.absent[arm.quantizer])
            continue
        spec = with_changes(base, {"quantize": _find(preset.quantizers, arm.quantizer)})
        if arm.variant:
            spec = _with_variant(spec, preset, arm.variant)
        spec = with_changes(spec, merged(table.changes, arm.changes))
        yield PlannedArm(arm, cells, load_spec(ExperimentSpec, spec.model_dump(), overrides))


def _with_variant(spec: ExperimentSpec, preset: ReproducePreset, name: str) -> ExperimentSpec:
    variant = _find(preset.variants, name)
    changes: dict[str, Any] = dict(variant.changes)
    if variant.epochs and "epochs" in type(spec.quantize).model_fields:
        changes = merged(changes, {"quantize": {"epochs": variant.epochs}})
    return with_changes(spec, changes)


def _find(held: dict[str, Any], name: str) -> Any:
    if name not in held:
        raise SpecError(f"the preset has no {name!r}", remedy=f"it has {', '.join(held)}")
    return held[name]
