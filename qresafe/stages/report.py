"""The report: one HTML page that needs no network, its figures as JSON, and a model-card section.

Completions are hostile text. They pass through Jinja's autoescaping only, and the page forbids
itself scripts and every connection by a Content-Security-Policy of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from upath import UPath

from qresafe.artifacts import Artifact, Run, content_key, write_text
from qresafe.progress import Progress
from qresafe.provenance import git_revision, hardware, versions
from qresafe.redaction import redact_data
from qresafe.stages import report_parts as parts
from qresafe.stages import report_view as view
from qresafe.stages.compare import read_comparison
from qresafe.stages.examples import choose, told
from qresafe.stages.narrative import details, headline
from qresafe.stages.report_data import Provenance, ReportData, StageCost, StageKey

CODE_VERSION = 3
TEMPLATES = Path(__file__).parent / "templates"
FILES = ("report.html", "report.json", "model_card.md")


@dataclass(frozen=True)
class ReportInput:
    """Everything that a report tells of.

    Attributes:
        spec: The resolved experiment, as JSON-able data.
        comparison: The finished `compare` stage.
        arms: Label -> its finished `generate` and `judge` stages; examples are taken from them.
        stages: (name, finished stage) in the order of work, for cost and provenance.
        patch: The finished `patch` stage, for its history.jsonl; None: no curves.
        export: The finished `export` stage, for its counts; None: nothing about codes.
        session_seconds: What it took to reach the cluster; 0 in one process.
    """

    spec: Mapping[str, Any]
    comparison: Artifact
    arms: Mapping[str, tuple[Artifact, Artifact]]
    stages: Sequence[tuple[str, Artifact]] = ()
    patch: Artifact | None = None
    export: Artifact | None = None
    session_seconds: float = 0.0


def report(run: Run, given: ReportInput, progress: Progress) -> Artifact:
    """Write report.html, report.json and model_card.md.

    Args:
        run: Where the result goes.
        given: What to tell of.
        progress: Told of every file.
    """

    def work(folder: UPath) -> Mapping[str, Any]:
        progress.start("report", len(FILES), "files")
        shown = tell(given)
        for name, text in render(shown).items():
            write_text(folder / name, text)
            progress.advance(note=name)
        progress.finish()
        return {"headline": shown["headline"]}

    made = run.stage(
        "report",
        spec=json.loads(json.dumps(given.spec)),
        inputs=_inputs(given),
        code_version=CODE_VERSION,
        work=work,
    )
    return made.shown(progress, "report")


def tell(given: ReportInput) -> dict[str, Any]:
    """Return all that the templates show."""
    comparison = read_comparison(given.comparison)
    export = dict(given.export.manifest.counts) if given.export else {}
    history = _history(given.patch)
    costs = view.cost(given.stages, given.session_seconds)
    return {
        "name": given.spec.get("name", "comparison"),
        "headline": headline(comparison),
        "details": details(comparison),
        "comparison": comparison,
        "arms": [_arm(arm.label) for arm in comparison.arms],
        "panels": view.panels(comparison),
        "table": view.table(comparison),
        "counts": view.counts(comparison),
        "agreement": view.agreement(comparison),
        "flips": view.flips(comparison),
        "attribution": view.attribution(comparison),
        "parts": parts.parts(comparison),
        "attacks": parts.attacks(comparison),
        "worst_cases": parts.worst_cases(comparison),
        "at_k": parts.at_k(comparison),
        "contamination": parts.contamination(comparison),
        "sources": parts.sources(comparison),
        "examples": choose(told(given.arms)),
        "curves": view.curves(history),
        "layers": view.layers(export),
        "export": export,
        "cost": costs,
        "seconds": sum(row.seconds for row in costs),
        "startup": sum(row.startup or 0.0 for row in costs),
        "spec": yaml.safe_dump(redact_data(given.spec), sort_keys=False),
        "seeds": view.seeds(given.spec),
        "versions": versions(),
        "hardware": hardware(),
        "git": git_revision(),
        "keys": [(name, artifact.key, artifact.manifest.inputs) for name, artifact in given.stages],
    }


def render(shown: Mapping[str, Any]) -> dict[str, str]:
    """Return file name -> text."""
    templates = environment()
    page = templates.get_template("report.html.jinja").render(shown)
    card = templates.overlay(finalize=_markdown).get_template("model_card.md.jinja").render(shown)
    return {"report.html": page, "report.json": _json(shown), "model_card.md": card}


def environment() -> Environment:
    """Return the templates: everything that ends in .html is escaped."""
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=lambda name: bool(name and ".html" in name),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _markdown(value: Any) -> Any:
    """Return what the card prints without tags and links: names in it may be anything."""
    if not isinstance(value, str):
        return value
    return value.replace("<", "&lt;").replace("[", "\\[").replace("\n", " ")


def _json(shown: Mapping[str, Any]) -> str:
    data = ReportData(
        name=shown["name"],
        verdict=[shown["headline"], *shown["details"]],
        comparison=shown["comparison"],
        export=shown["export"],
        cost=[StageCost(**row._asdict()) for row in shown["cost"]],
        provenance=Provenance(
            **{name: shown[name] for name in ("versions", "hardware", "git", "seeds")}
        ),
        stages={name: StageKey(key=key, inputs=inputs) for name, key, inputs in shown["keys"]},
        spec=yaml.safe_load(shown["spec"]),
    )
    return data.model_dump_json(indent=1)


def _arm(label: str) -> dict[str, str]:
    meaning = view.ARMS[label][1] if label in view.ARMS else ""
    return {"label": view.short(label), "paint": view.paint(label), "meaning": meaning}


def _history(patch: Artifact | None) -> list[dict[str, Any]]:
    if patch is None:
        return []
    lines = (patch.path / "history.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _inputs(given: ReportInput) -> dict[str, str]:
    stages = content_key([[name, artifact.key] for name, artifact in given.stages])
    found = {"comparison": given.comparison.key, "stages": stages}
    for name, artifact in (("patch", given.patch), ("export", given.export)):
        if artifact is not None:
            found[name] = artifact.key
    return found
