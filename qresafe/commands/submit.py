"""`qresafe submit`: an experiment, a stage or a search as a job on a cluster."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from qresafe.commands.options import Name, Overrides, Storage, Workers, experiment
from qresafe.commands.search import load
from qresafe.errors import ResourceError, SpecError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

NOT_FOLLOWED = 3  # the exit code after Ctrl-C or a broken connection: the job goes on

Address = Annotated[
    str | None,
    typer.Option(
        help="The dashboard's address; default: $RAY_API_SERVER_ADDRESS, or this machine's."
    ),
]


def submit(
    preset: Annotated[
        str | None, typer.Argument(help="A preset, or a YAML file below --working-dir.")
    ] = None,
    address: Address = None,
    stage: Annotated[
        str | None, typer.Option(help="Run up to this stage only; default: the whole experiment.")
    ] = None,
    search: Annotated[bool, typer.Option("--search", help="PRESET is a search space.")] = False,
    overrides: Overrides = None,
    workers: Workers = None,
    storage: Storage = None,
    name: Name = None,
    working_dir: Annotated[
        Path, typer.Option(help="The project's folder, which is sent to the cluster.")
    ] = Path(),
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Files not to send, besides .gitignore and .rayignore; as there."),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Pass this environment variable on; its name alone."),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", help="Show the log; the exit code is the job's.")
    ] = True,
    stop: Annotated[
        str | None, typer.Option("--stop", metavar="ID", help="Stop this job instead.")
    ] = None,
) -> None:
    """Run PRESET as a job on a Ray cluster: checked here first, then sent, followed and awaited.

    The log goes to stdout (with --no-follow, the job's id alone), all else to stderr.
    """
    if stop:
        _stop(address, stop)
    if preset is None:
        raise SpecError("no PRESET", remedy="name a preset, or a job to --stop")
    shared = {"--workers": workers, "--storage": storage, "--name": name}
    options = [f"--set={each}" for each in overrides or []]
    options += [f"{key}={value}" for key, value in shared.items() if value is not None]
    if search:
        load(preset, overrides, workers=workers, storage=storage, name=name)
    else:
        experiment(preset, overrides, workers=workers, storage=storage, name=name)
    command = command_of(_sent(preset, working_dir), stage, search, options)

    from qresafe.dist import jobs

    chosen = jobs.chosen_environment(env or [])
    client = _connect(address)
    job = jobs.Job(command, working_dir.absolute(), exclude or [], chosen)
    made = jobs.submit(client, job, _note)
    if not follow:
        typer.echo(made)
        return
    _note(f"job {made} (stop it with: qresafe submit --stop {made})")
    _follow(client, made)


def command_of(preset: str, stage: str | None, search: bool, options: list[str]) -> list[str]:
    """Return the words of a job's command line.

    Args:
        preset: A preset's or a space's name, or its file's path in the working directory.
        stage: Where to stop; None: at the report.
        search: `preset` is a search space.
        options: What is handed on as it is.

    Raises:
        SpecError: A search has no such stage, or there is none of this name.
    """
    from qresafe.commands.running import wanted

    run = ["python", "-m"]
    if search and stage:
        raise SpecError("--search and --stage exclude each other", remedy="leave one of them out")
    if search:
        return [*run, "ray_jobs.search_patch", "--space", preset, *options]
    if stage:
        wanted(stage)
        return [*run, "ray_jobs.run_stage", "--stage", stage, "--preset", preset, *options]
    return [*run, "ray_jobs.run_experiment", "--preset", preset, *options]


def _sent(preset: str, working_dir: Path) -> str:
    """Return what `preset` is called in the job's copy of the working directory."""
    if not (working_dir / "ray_jobs").is_dir() or not (working_dir / "qresafe").is_dir():
        remedy = "give the --working-dir that you cloned or unpacked it to"
        raise SpecError("not qresafe's folder", where=str(working_dir.absolute()), remedy=remedy)
    file = Path(preset)
    if not file.is_file():
        return preset
    try:
        return str(file.resolve().relative_to(working_dir.resolve()))
    except ValueError:
        remedy = f"copy it to below {working_dir.absolute()}, which is what the job sees"
        raise SpecError("outside of what is sent", where=str(file), remedy=remedy) from None


def _connect(address: str | None) -> JobSubmissionClient:
    from qresafe.dist import jobs

    client = jobs.connect(address)
    if jobs.in_the_clear(client.get_address()):
        _note("the token travels unencrypted: `ray dashboard cluster.yaml` makes an ssh tunnel")
    return client


def _follow(client: JobSubmissionClient, job: str) -> NoReturn:
    from qresafe.console import FollowedLog
    from qresafe.dist import jobs

    stop = f"stop it with: qresafe submit --stop {job}"
    try:
        with closing(FollowedLog()) as log:
            ending = jobs.follow(client, job, log)
    except KeyboardInterrupt:
        _note(f"the job goes on; {stop}")
        raise typer.Exit(NOT_FOLLOWED) from None
    except ResourceError as error:  # its exit code would be that of a job's own mistake
        _note(f"error: {error}")
        _note(f"the job goes on, unless its cluster ended; {stop}")
        raise typer.Exit(NOT_FOLLOWED) from None
    _note(f"job {job}: {ending.status}" + (f" ({ending.message})" if ending.code else ""))
    raise typer.Exit(ending.code)


def _stop(address: str | None, job: str) -> NoReturn:
    from qresafe.dist import jobs

    ending = jobs.stop(_connect(address), job)
    _note(f"job {job}: {ending.status}")
    raise typer.Exit(0)


def _note(text: str) -> None:
    typer.echo(text, err=True)
