"""A search: `python -m ray_jobs.search_patch --space quick-cpu`; submit it again to continue it."""

from __future__ import annotations

from typing import Annotated

import typer

from qresafe.commands.launch import launch
from qresafe.commands.options import AsJson
from qresafe.commands.search import Resume, execute, load
from ray_jobs.entry import Name, Overrides, Storage, Workers, job_storage

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    space: Annotated[str, typer.Option(help="A YAML file, or a name in tune_spaces/.")],
    overrides: Overrides = None,
    workers: Workers = None,
    storage: Storage = None,
    name: Name = None,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Run a search on the cluster of this job, and print its table."""
    found = load(space, overrides, workers=workers, storage=storage, name=name)
    found = found.at(job_storage(found.experiment.storage))
    execute(found, resume=resume, show=False, as_json=as_json)


if __name__ == "__main__":
    launch(app)
