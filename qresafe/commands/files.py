"""`judge` and `compare`: of an experiment's arms, or of completions that are already there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qresafe.commands.options import (
    AsJson,
    Name,
    Overrides,
    Storage,
    Workers,
    experiment,
)
from qresafe.commands.running import Arms, execute, stage_data, started, tell_comparison, wanted
from qresafe.errors import SpecError

if TYPE_CHECKING:
    from qresafe.artifacts import Artifact
    from qresafe.progress import Progress
    from qresafe.specs import ExperimentSpec

Judged = tuple["Artifact", "Artifact"]  # completions and the verdicts on them


def judge(
    source: Annotated[
        str,
        typer.Argument(
            help="An experiment (YAML or preset), or completions: a generate stage's folder, or a "
            "JSONL or Parquet file (or a folder of them) with prompt and completion."
        ),
    ],
    arms: Arms = None,
    overrides: Overrides = None,
    workers: Workers = None,
    storage: Storage = None,
    name: Name = None,
    as_json: AsJson = False,
) -> None:
    """Judge completions with every judge of `evaluate.judges`; judging never generates again."""
    if not _is_file(source):
        spec = experiment(source, overrides, workers=workers, storage=storage, name=name)
        execute(spec, wanted("judge", arms), as_json=as_json)
        return
    from qresafe.console import progress_on

    with progress_on() as progress:
        _, verdicts = judged(file_spec(overrides, storage, name, workers), source, progress)
    if as_json:
        typer.echo(json.dumps(stage_data("judge", verdicts), indent=1))
        return
    for judge_name, axes in verdicts.manifest.counts.items():
        for axis, outcomes in axes.items():
            found = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
            typer.echo(f"{judge_name}, {axis}: {found}")
    typer.echo(f"verdicts: {verdicts.path / 'verdicts.parquet'}")


def compare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG | A B...",
            help="One experiment, or two or more completions (as for `judge`), each of them "
            "LABEL=PATH or a path.",
        ),
    ],
    overrides: Overrides = None,
    workers: Workers = None,
    storage: Storage = None,
    name: Name = None,
    as_json: AsJson = False,
) -> None:
    """Compare models on the same prompts: shares, intervals, paired flips, attribution."""
    if len(sources) == 1:
        spec = experiment(sources[0], overrides, workers=workers, storage=storage, name=name)
        execute(spec, wanted("compare"), as_json=as_json)
        return
    named_paths = labelled(sources)
    from qresafe.artifacts import Run
    from qresafe.console import progress_on
    from qresafe.stages.compare import compare as compare_stage

    spec = file_spec(overrides, storage, name, workers)
    with progress_on() as progress:
        named = {label: judged(spec, path, progress) for label, path in named_paths}
        made = compare_stage(Run(spec.storage, spec.name), named, progress)
    if as_json:
        typer.echo((made.path / "comparison.json").read_text())
    else:
        tell_comparison(made)


def judged(spec: ExperimentSpec, source: str, progress: Progress) -> Judged:
    """Return the completions at `source`, and every judge's verdicts on them."""
    from qresafe.artifacts import Run
    from qresafe.stages.imported import completions_of
    from qresafe.stages.judge import check_judges
    from qresafe.stages.judge import judge as judge_stage

    run, judges = Run(spec.storage, spec.name), spec.evaluate.judges
    completions = completions_of(run, Path(source))
    label = Path(source).name
    if all(isinstance(judge, str) for judge in judges):  # rules need no workers
        return completions, judge_stage(run, completions, judges, progress, label)
    check_judges(judges, run)
    with closing(started(spec, progress)) as runtime:
        return completions, judge_stage(run, completions, judges, progress, label, runtime)


def _is_file(source: str) -> bool:
    path = Path(source)
    if path.suffix in (".parquet", ".jsonl") or (path / "completions.parquet").exists():
        return True
    return path.is_dir() and any(path.glob("*.jsonl"))


def file_spec(
    overrides: list[str] | None,
    storage: str | None,
    name: str | None,
    workers: int | None = None,
) -> ExperimentSpec:
    """Return the experiment whose judges and storage commands on files use."""
    return experiment(None, overrides, workers=workers, storage=storage, name=name or "files")


def labelled(sources: Sequence[str]) -> list[tuple[str, str]]:
    """Split LABEL=PATH; what has no label is called A, B, C by its place."""
    pairs = []
    for place, source in enumerate(sources):
        label, equals, path = source.partition("=")
        pairs.append((label, path) if equals else (chr(ord("A") + place), source))
    if len({label for label, _ in pairs}) < len(pairs):
        raise SpecError("two sources have the same label", remedy="give each its own LABEL=PATH")
    return pairs
