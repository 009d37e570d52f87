"""`qresafe reproduce`: the paper's tables, answered for a model."""

from __future__ import annotations

import json
import shlex
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qresafe.commands.options import AsJson, Overrides, Storage, Workers, with_shortcuts
from qresafe.errors import SpecError

if TYPE_CHECKING:
    from qresafe.planning.hardware import Cluster
    from qresafe.planning.rows import Need
    from qresafe.specs import ExperimentSpec
    from qresafe.stages.reproduce.filled import FilledRow
    from qresafe.stages.reproduce.mt_bench import MtBench
    from qresafe.stages.reproduce.plan import PlannedArm

ALL = "all"


def reproduce(
    tables: Annotated[
        list[str],
        typer.Argument(help="table3 ... table13, figure1 (the paper's numbers), or all."),
    ],
    preset: Annotated[
        str, typer.Option(help="embedded (CPU, minutes a row), llama2-7b or gemma-7b.")
    ] = "embedded",
    seeds: Annotated[
        list[int] | None, typer.Option("--seed", min=0, help="May be given several times.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would run and what it needs; run nothing.")
    ] = False,
    cluster: Annotated[
        str | None,
        typer.Option(metavar="4xA100-80", help="What --dry-run plans for; default: what is here."),
    ] = None,
    mt_bench: Annotated[
        Path | None,
        typer.Option(help="FastChat's question.jsonl: measure Table 5's MT-Bench too, by --judge."),
    ] = None,
    references: Annotated[
        Path | None,
        typer.Option(help="Its reference answers to maths, reasoning and coding (gpt-4.jsonl)."),
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="Who grades MT-Bench: its name at the endpoint, e.g. gpt-4.")
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(help="The judge's OpenAI-compatible server; the key is OPENAI_API_KEY's."),
    ] = None,
    overrides: Overrides = None,
    workers: Workers = None,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Answer tables of the paper for a model: its value, ours with intervals, the difference.

    The rows of all tables share one run per seed, so what one table has made, another reuses, and
    the same command again continues where it was stopped. Pages go to STORAGE/reproduce/PRESET/.
    """
    from qresafe.stages.reproduce.plan import planned
    from qresafe.stages.reproduce.tables import paper_table, table_names
    from qresafe.stages.reproduce.tables import preset as named

    asked = table_names() if ALL in tables else tuple(tables)
    given = with_shortcuts(overrides, workers=workers, storage=storage)
    model, seeds = named(preset), list(dict.fromkeys(seeds or [0]))
    plans = {name: planned(paper_table(name), model, given) for name in asked}
    if dry_run:
        _tell_plan(plans, len(seeds), cluster, as_json=as_json)
        return
    graded = _mt_bench(mt_bench, references, judge, endpoint, model.mt_bench_tokens)
    found = _measure(plans, preset, seeds, graded)
    options = graded.options if graded else []
    options += [word for one in given for word in ("--set", one)]
    _write(plans, found, preset, options, as_json=as_json)
    _require_figures(found)


def _first(plans: dict[str, list[PlannedArm]]) -> ExperimentSpec:
    """Return a row's experiment: where they run and are kept is the same for all."""
    return next(arm.spec for arms in plans.values() for arm in arms if arm.spec)


def _mt_bench(
    questions: Path | None,
    references: Path | None,
    judge: str | None,
    endpoint: str | None,
    max_new_tokens: int,
) -> MtBench | None:
    """Return what grades MT-Bench, if that is asked for."""
    from qresafe.commands.judge_models import endpoint_spec
    from qresafe.stages.reproduce.mt_bench import MtBench

    given = {"--references": references, "--judge": judge, "--endpoint": endpoint}
    if questions is None:
        if lone := [option for option, value in given.items() if value is not None]:
            remedy = "add --mt-bench question.jsonl"
            raise SpecError(f"{lone[0]} is of MT-Bench, which was not asked for", remedy=remedy)
        return None
    if not judge:
        raise SpecError("nobody grades MT-Bench", remedy="add --judge, e.g. --judge gpt-4")
    return MtBench(questions, references, endpoint_spec(judge, endpoint, []), max_new_tokens)


def _measure(
    plans: dict[str, list[PlannedArm]], preset: str, seeds: list[int], mt_bench: MtBench | None
) -> dict[str, list[FilledRow]]:
    """Return table -> its rows, all seeds."""
    from qresafe.artifacts import Run
    from qresafe.commands.running import started
    from qresafe.console import progress_on
    from qresafe.driving import driving
    from qresafe.stages.reproduce.filled import experiment_of, filled, run_name
    from qresafe.stages.runtime import InProcessRuntime

    found: dict[str, list[FilledRow]] = {name: [] for name in plans}
    first = _first(plans)
    with progress_on() as progress:
        # Before Ray starts: a mistake should cost a second, and not once for every row.
        name = run_name(preset, seeds[0])
        experiment_of(first, seeds[0], name, InProcessRuntime(), progress).check()
        if mt_bench:
            mt_bench.check()
        with closing(started(first, progress)) as runtime:
            for seed in seeds:
                name = run_name(preset, seed)
                with driving(Run(first.storage, name).root, progress) as told:
                    for table, arms in plans.items():
                        found[table] += filled(arms, seed, name, runtime, told, mt_bench)
    return found


def _require_figures(found: dict[str, list[FilledRow]]) -> None:
    """Fail where no row at all could be measured; the pages say why."""
    from qresafe.errors import ModelError

    rows = [row for of_table in found.values() for row in of_table]
    if not any(row.figures for row in rows):
        raise ModelError("no row could be measured", remedy=f"the first says: {rows[0].refused}")


def _write(
    plans: dict[str, list[PlannedArm]],
    found: dict[str, list[FilledRow]],
    preset: str,
    options: list[str],
    *,
    as_json: bool,
) -> None:
    """Write a page and its figures for each table, and tell where they are."""
    from upath import UPath

    from qresafe.artifacts import write_text
    from qresafe.stages.reproduce.page import page
    from qresafe.stages.reproduce.tables import paper_table
    from qresafe.stages.reproduce.tables import preset as named

    folder = UPath(_first(plans).storage) / "reproduce" / preset
    folder.mkdir(parents=True, exist_ok=True)
    told = {}
    for name, arms in plans.items():
        rows = found[name]
        command = _command(name, preset, rows, options)
        about = f"Made by `{command}` on {_when_and_where()}."
        text = page(paper_table(name), arms, rows, named(preset), about)
        data = [row.model_dump() for row in rows]
        write_text(folder / f"{name}.md", text)
        write_text(folder / f"{name}.json", json.dumps(data, indent=1))
        told[name] = {"page": str(folder / f"{name}.md"), "rows": data}
        if not as_json:
            typer.echo(f"{text}\npage: {folder / name}.md")
    if as_json:
        typer.echo(json.dumps(told, indent=1))


def _command(name: str, preset: str, rows: list[FilledRow], options: list[str]) -> str:
    words = ["qresafe", "reproduce", name, "--preset", preset]
    for seed in dict.fromkeys(row.seed for row in rows):
        words += ["--seed", str(seed)]
    return shlex.join(words + options)


def _when_and_where() -> str:
    from datetime import UTC, datetime

    from qresafe.provenance import hardware

    machine = hardware()
    return f"{datetime.now(UTC):%Y-%m-%d}, {machine['cpus']} CPU cores ({machine['machine']})"


def _tell_plan(
    plans: dict[str, list[PlannedArm]], seeds: int, cluster: str | None, *, as_json: bool
) -> None:
    """Print what every row needs, and what all of them need together."""
    from qresafe.console import table
    from qresafe.planning.hardware import hardware
    from qresafe.planning.shapes import shape_of
    from qresafe.stages.reproduce.tables import paper_table

    first = _first(plans)
    on, shape = _cluster(first, cluster), shape_of(first.model)
    needs = {name: [_need(arm, on) for arm in arms] for name, arms in plans.items()}
    known = [need for of_table in needs.values() for need in of_table if need]
    hours, cost = (
        seeds * sum(getattr(n, what) for n in known) for what in ("device_hours", "cost")
    )
    if as_json:
        rows = {
            name: [
                {"row": arm.arm.title, "cells": arm.cells, "needs": need and asdict(need)}
                for arm, need in zip(arms, needs[name], strict=True)
            ]
            for name, arms in plans.items()
        }
        whole = {"model": first.model.path, "cluster": on.text, "seeds": seeds}
        typer.echo(json.dumps(whole | {"device_hours": hours, "cost_usd": cost, "tables": rows}))
        return
    prices = hardware().as_of
    typer.echo(
        f"{first.model.path}, {shape.parameters / 1e9:.3g} B weights, on {on.text}; {seeds} seed(s)"
    )
    header = ["row", "quantizer", "patched", "GPU-hours", "GiB", "USD", "measured"]
    for name, arms in plans.items():
        typer.echo(f"\n{name}: {paper_table(name).title}")
        table(
            header, [_row(*pair, seeds) for pair in zip(arms, needs[name], strict=True)], words=True
        )
    typer.echo(
        f"\nTogether {_figure(hours)} GPU-hours and USD {_figure(cost)} (prices of {prices}), as "
        "if a row shared no stage with another: an upper bound. GiB: per GPU (or process), ! where "
        "there are fewer. See docs/plan.md."
    )


def _cluster(spec: ExperimentSpec, written: str | None) -> Cluster:
    from qresafe.dist.capacity import found_cluster
    from qresafe.planning.hardware import parse_cluster

    return parse_cluster(written) if written else found_cluster(spec.resources)


def _need(arm: PlannedArm, on: Cluster) -> Need | None:
    """Return what a row needs; None where there is no experiment."""
    from qresafe.planning.rows import need

    return need(arm.spec, on, patched=arm.patched) if arm.spec else None


def _row(arm: PlannedArm, need: Need | None, seeds: int) -> list[str]:
    cells = ", ".join(arm.cells)
    if arm.spec is None or need is None:
        return [arm.arm.title, f"not here: {arm.absent}", "no", "", "", "", cells]
    room = "" if need.fits else " !"
    hours, cost = (_figure(seeds * value) for value in (need.device_hours, need.cost))
    sizes = [hours, f"{need.gib:.1f}{room}", cost]
    return [arm.arm.title, arm.spec.quantize.method, "yes" if arm.patched else "no", *sizes, cells]


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
