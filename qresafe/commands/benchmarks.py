"""`benchmarks`: the prompt sets that a spec may name, their licences and whom to cite."""

from __future__ import annotations

import json
from typing import Any

import typer

from qresafe.commands.options import AsJson

OWN = {
    "embedded": "all three, split dev or test; shipped",
    "prompts": "any file of yours, with path",
}


def benchmarks(as_json: AsJson = False) -> None:
    """List the benchmarks: axes, licence, where each is found, and whom to cite."""
    from qresafe.benchmarks.catalogue import catalogue, environment
    from qresafe.console import table

    entries: dict[str, dict[str, Any]] = {
        name: entry.model_dump(include={"title", "licence", "citation", "hub", "source", "gated"})
        | {"axes": list(entry.axes), "subsets": list(entry.subsets)}
        | {"environment": environment(name)}
        for name, entry in catalogue().items()
    }
    if as_json:
        typer.echo(json.dumps(entries, indent=1))
        return
    rows = [[name, title, "", "", ""] for name, title in OWN.items()]
    for name, told in entries.items():
        where = (told["hub"] or told["source"]) + (" (gated)" if told["gated"] else "")
        axes = ", ".join([*told["axes"], *(f"subset {one}" for one in told["subsets"])])
        rows.append([name, axes, told["licence"], where, told["citation"]])
    table(["benchmark", "axes", "licence", "hub id or source", "cite"], rows, words=True)
    typer.echo("\nNothing is bundled. A set comes from path, else $QRESAFE_<NAME>, else the hub.")
