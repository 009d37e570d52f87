"""A whole experiment: `python -m ray_jobs.run_experiment --preset demo`."""

from __future__ import annotations

import typer

from qresafe.commands.launch import launch
from qresafe.commands.options import AsJson
from qresafe.commands.running import execute, wanted
from ray_jobs.entry import Name, Overrides, Preset, Storage, Workers, job_experiment

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    preset: Preset,
    overrides: Overrides = None,
    workers: Workers = None,
    storage: Storage = None,
    name: Name = None,
    as_json: AsJson = False,
) -> None:
    """Run a whole experiment on the cluster of this job, and print its table."""
    spec = job_experiment(preset, overrides, workers, storage, name)
    execute(spec, wanted("report"), as_json=as_json, room=True)


if __name__ == "__main__":
    launch(app)
