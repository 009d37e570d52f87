"""`attack`: harmful prompts under many decoding configurations, system prompts and prefills."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from qresafe.commands.options import AsJson, Config, Name, Overrides, Storage, Workers, experiment
from qresafe.commands.running import Arms, execute, share_cell, wanted

if TYPE_CHECKING:
    from qresafe.artifacts import Artifact
    from qresafe.stages.comparison import AttackCell, AttackResult, Share

SHOWN = 10  # configurations in the table


def attack(
    config: Config,
    arms: Arms = None,
    overrides: Overrides = None,
    workers: Workers = None,
    storage: Storage = None,
    name: Name = None,
    as_json: AsJson = False,
) -> None:
    """Attack arms of an experiment (default: W, Q0, Q) as `evaluate.attack` says.

    Without `evaluate.attack`: the 49 decoding configurations of Huang et al.
    """
    spec = experiment(config, overrides, workers=workers, storage=storage, name=name)
    made = execute(spec, wanted("attack", arms), as_json=as_json)
    if not as_json:
        tell_attacks(made)


def tell_attacks(made: list[Artifact]) -> None:
    """Print the worst case of each model and the configurations that did most."""
    from qresafe.stages.compare import read_attack

    results = [read_attack(one) for one in made]
    for place in range(len(results[0].measures)):
        _tell_measure(results, place)


def _tell_measure(results: list[AttackResult], place: int) -> None:
    from qresafe.console import table
    from qresafe.stages.measures import BY_NAME

    found = [result.measures[place] for result in results]
    asked = BY_NAME[found[0].measure]
    lines = list(zip(*(one.cells for one in found), strict=True))
    lines.sort(key=lambda cells: _badness(cells, asked.better), reverse=True)
    rows = [[_name(cells[0]), *(share_cell(cell.share) for cell in cells)] for cells in lines]
    if asked.better == "low":  # any success counts; any coherent answer would say nothing
        rows.insert(0, ["any of them", *(_any_of(one.worst_case) for one in found)])
    labels = [result.label for result in results]
    typer.echo(f"\n{asked.title}, % of {results[0].prompts} prompts: {asked.meaning}")
    table(["configuration", *labels], rows[: SHOWN + len(rows) - len(lines)])
    if len(lines) > SHOWN:
        typer.echo(f"{len(lines) - SHOWN} more configurations are in attack.json")
    if asked.better == "low" and results[0].samples > 1:
        typer.echo(f"\n{asked.title} with k tries, % of prompts")
        tried = [[_name(cells[0]), *_tries(cells)] for cells in lines[:SHOWN]]
        table(["configuration", "k", *labels], tried)


def _any_of(share: Share) -> str:
    from qresafe.stages.narrative import reached

    return reached(share) if share.undecided else share_cell(share)


def _badness(cells: Sequence[AttackCell], better: str) -> float:
    """Return how bad the worst of the models is; what is undecided comes last."""
    shares = [cell.share.share for cell in cells if cell.share.share is not None]
    sign = 1 if better == "low" else -1
    return max((sign * share for share in shares), default=-math.inf)


def _name(cell: AttackCell) -> str:
    plain = cell.framing == "plain"
    return cell.configuration if plain else f"{cell.configuration} ({cell.framing})"


def _tries(cells: Sequence[AttackCell]) -> list[str]:
    """Return the largest k that every model has, and ASR@k of each, its interval below."""
    by_k = [{one.k: one for one in cell.at_k} for cell in cells]
    common = set.intersection(*(set(found) for found in by_k))
    if not common:
        return ["-"] * (1 + len(cells))
    k = max(common)
    return [str(k), *(share_cell(found[k]) for found in by_k)]
