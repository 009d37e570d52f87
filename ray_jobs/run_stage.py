"""One stage and what it needs: `python -m ray_jobs.run_stage --stage pairs --preset demo`."""

from __future__ import annotations

from typing import Annotated

import typer

from qresafe.commands.experiment import WITH_PATCH
from qresafe.commands.launch import launch
from qresafe.commands.options import AsJson
from qresafe.commands.running import STAGES, Arms, execute, wanted
from ray_jobs.entry import Name, Overrides, Preset, Storage, Workers, job_experiment

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    stage: Annotated[str, typer.Option(help=f"One of {', '.join(STAGES)}.")],
    preset: Preset,
    arms: Arms = None,
    overrides: Overrides = None,
    workers: Workers = None,
    storage: Storage = None,
    name: Name = None,
    as_json: AsJson = False,
) -> None:
    """Run an experiment up to a stage; what is finished is reused."""
    want = wanted(stage, arms)
    spec = job_experiment(preset, overrides, workers, storage, name)
    execute(spec, want, as_json=as_json, room=stage in WITH_PATCH)


if __name__ == "__main__":
    launch(app)
