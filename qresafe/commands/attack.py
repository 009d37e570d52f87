"""`attack`: harmful prompts under many decoding configurations, system prompts and prefills."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from qresafe.commands.options import AsJson, Config, Name, Overrides, Storage, Workers, experiment
from qresafe.commands.running import Arms, execute, share_cell, wanted

if TYPE_CHECKING:
    from qresafe.artifacts import Artifact

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
    from qresafe.console import table
    from qresafe.stages.compare import read_attack
    from qresafe.stages.measures import BY_NAME

    results = [read_attack(one) for one in made]
    for place, measure in enumerate(results[0].measures):
        asked = BY_NAME[measure.measure]
        found = [result.measures[place] for result in results]
        columns = list(zip(*(one.cells for one in found), strict=True))
        columns.sort(key=lambda row: -max(cell.share.share or 0.0 for cell in row))
        rows = [["any of them", *(share_cell(one.worst_case) for one in found)]]
        for cells in columns[:SHOWN]:
            framing = "" if cells[0].framing == "plain" else f" ({cells[0].framing})"
            label = f"{cells[0].configuration}{framing}"
            rows.append([label, *(share_cell(cell.share) for cell in cells)])
        typer.echo(f"\n{asked.title}, % of {results[0].prompts} prompts: {asked.meaning}")
        table(["configuration", *(result.label for result in results)], rows)
        if len(columns) > SHOWN:
            typer.echo(f"{len(columns) - SHOWN} more configurations are in attack.json")
