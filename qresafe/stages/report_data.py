"""The shape of report.json; `python docs/report_schema.py` writes docs/report.schema.json."""

from __future__ import annotations

from typing import Any

from qresafe.stages.comparison import Comparison, Found


class StageCost(Found):
    """A stage's time.

    Attributes:
        stage: Its name.
        seconds: Wall-clock time, in the run that computed it.
        startup: Of them, processes, imports and loading models; None: not told apart.
        speed: Tokens per second as people read it; "" for stages without.
        reused: Whether an earlier run had computed it.
    """

    stage: str
    seconds: float
    startup: float | None
    speed: str
    reused: bool


class StageKey(Found):
    """Where a stage's result lies: its key, and those of what it was made from."""

    key: str
    inputs: dict[str, str]


class Provenance(Found):
    """What made the figures.

    Attributes:
        versions: Package -> version.
        hardware: Of the machine that wrote the report.
        git: The project's revision; None outside a checkout.
        seeds: Dotted key of the spec -> seed.
    """

    versions: dict[str, str]
    hardware: dict[str, Any]
    git: str | None
    seeds: dict[str, Any]


class ReportData(Found):
    """A report's figures.

    Attributes:
        name: The experiment's name.
        verdict: The headline, and the sentences below it.
        comparison: Every figure of every arm.
        export: Counts of the export stage; empty without a patch.
        cost: Every stage's time.
        provenance: What made the figures.
        stages: Name of each stage -> its key.
        spec: The resolved experiment.
    """

    name: str
    verdict: list[str]
    comparison: Comparison
    export: dict[str, Any]
    cost: list[StageCost]
    provenance: Provenance
    stages: dict[str, StageKey]
    spec: dict[str, Any] | None
