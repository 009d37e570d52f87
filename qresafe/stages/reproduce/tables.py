"""The paper's tables (arXiv 2506.20251v1) and presets to answer them with: tables/, presets/."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from qresafe.errors import SpecError, nearest
from qresafe.loading import load_spec, merged, read_yaml
from qresafe.spec_base import Spec

HERE = Path(__file__).parent


class PaperArm(Spec):
    """One row of a table.

    Attributes:
        quantizer: A name of the preset's `quantizers`.
        variant: A name of the preset's `variants`: which data the quantizer sees, and how often.
        label: What the row is called; empty: quantizer and variant.
        changes: Further changes of the experiment.
        only: The cells that this row has; none: all of the table's.
        paper: The paper's model -> cell -> the paper's value (% where ours is a share).
    """

    MAY_BE_EMPTY: ClassVar[frozenset[str]] = frozenset({"variant", "label"})
    quantizer: str
    variant: str = ""
    label: str = ""
    changes: dict[str, Any] = Field(default_factory=dict)
    only: tuple[str, ...] = ()
    paper: dict[str, dict[str, float]] = Field(default_factory=dict)

    @property
    def title(self) -> str:
        """What the row is called."""
        return self.label or ", ".join(filter(None, (self.quantizer, self.variant)))


class PaperTable(Spec):
    """One table of the paper.

    Attributes:
        title: Its number and subject.
        asks: The question it answers.
        cells: What is measured of each arm; see `measure.figure`.
        arms: Its rows.
        changes: Changes of the experiment that all rows share.
        notes: What to know when the two are compared, the paper's own inconsistencies among it.
        comparable: Whether the paper's values are of the same thing, so that a difference says
            something.
    """

    title: str
    asks: str
    cells: tuple[str, ...] = Field(min_length=1)
    arms: tuple[PaperArm, ...] = Field(min_length=1)
    changes: dict[str, Any] = Field(default_factory=dict)
    comparable: bool = True
    notes: tuple[str, ...] = ()


class Variant(Spec):
    """Changes of an experiment; `epochs` only where the quantizer fine-tunes by epochs."""

    changes: dict[str, Any] = Field(default_factory=dict)
    epochs: float | None = None


class ReproducePreset(Spec):
    """A model to answer the tables with.

    Attributes:
        model: Whose values of the paper stand beside ours.
        experiment: The preset of `qresafe run` that it starts from.
        changes: Changes of it.
        quantizers: Name -> the experiment's `quantize`.
        absent: Name -> why this preset has no such quantizer.
        variants: Name -> which calibration data.
        mt_bench_tokens: Of an answer to either turn of MT-Bench; 1024 are FastChat's.
        notes: What to know of its results.
    """

    model: str
    experiment: str
    changes: dict[str, Any] = Field(default_factory=dict)
    quantizers: dict[str, dict[str, Any]]
    absent: dict[str, str] = Field(default_factory=dict)
    variants: dict[str, Variant]
    mt_bench_tokens: int = 1024
    notes: tuple[str, ...] = ()


def table_names() -> tuple[str, ...]:
    """Return the names of the tables, in the paper's order."""
    names = [path.stem for path in (HERE / "tables").glob("*.yaml")]
    return tuple(sorted(names, key=lambda name: (len(name), name)))


def preset_names() -> tuple[str, ...]:
    """Return the names of the presets."""
    return tuple(sorted(path.stem for path in (HERE / "presets").glob("*.yaml")))


@cache
def paper_table(name: str) -> PaperTable:
    """Return a table by its name, such as "table5".

    Raises:
        SpecError: There is no such table.
    """
    if name not in table_names():
        raise SpecError(f"no table {name!r} of the paper", remedy=nearest(name, table_names()))
    return load_spec(PaperTable, read_yaml((HERE / "tables" / f"{name}.yaml").read_text()))


@cache
def preset(name: str) -> ReproducePreset:
    """Return a preset by its name, such as "embedded".

    Its file may name another preset as `base`, and then has only what differs.

    Raises:
        SpecError: There is no such preset.
    """
    if name not in preset_names():
        remedy = nearest(name, preset_names())
        raise SpecError(f"no preset {name!r} to reproduce tables with", remedy=remedy)
    return load_spec(ReproducePreset, _preset_data(name))


def _preset_data(name: str) -> dict[str, Any]:
    data: dict[str, Any] = read_yaml((HERE / "presets" / f"{name}.yaml").read_text())
    base = data.pop("base", None)
    return merged(_preset_data(base), data) if base else data
