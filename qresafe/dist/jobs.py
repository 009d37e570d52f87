"""Jobs on a cluster through Ray's job API: submitted, followed to their exit code, stopped."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from qresafe.dist.preflight_ray import authentication
from qresafe.dist.upload import measure_upload
from qresafe.errors import ResourceError, SpecError

ADDRESS = "RAY_API_SERVER_ADDRESS"  # Ray lets it win over any address that it is given
LOCAL = "http://127.0.0.1:8265"
# What a job is given of the environment, where it is set: never the whole of it. The cloud's keys
# are not among them: nodes have roles of their own.
PASSED = (
    "HF_TOKEN",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "MLFLOW_TRACKING_URI",
    "OPENAI_API_KEY",
    "QRESAFE_STORAGE",
)
CONNECT_SECONDS = 10.0
AWAY_SECONDS, AGAIN_SECONDS = 60.0, 2.0  # how long a cluster may be away from one who follows a job

T = TypeVar("T")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What to run.

    Attributes:
        command: The words of its command line.
        working_dir: The folder that is sent, and that it runs in a copy of.
        excludes: Patterns of files that are not sent, besides .gitignore and .rayignore.
        env: Environment variables that it gets.
    """

    command: Sequence[str]
    working_dir: Path
    excludes: Sequence[str] = ()
    env: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Ending:
    """How a job ended; `code` is what the command line ends with."""

    status: str
    code: int
    message: str = ""


def chosen_environment(names: Sequence[str]) -> dict[str, str]:
    """Return the variables that a job gets: those of `PASSED` that are set, and `names`.

    Args:
        names: Further variables, by name; their values come from this environment.

    Raises:
        SpecError: A name is not set here, or a value was given with it.
    """
    for name in names:
        key, equals, _ = name.partition("=")
        if equals:
            remedy = f"export {key}, and give its name alone: values end up in shell histories"
            raise SpecError(f"--env {key}=... has a value", remedy=remedy)
        if name not in os.environ:
            raise SpecError(f"--env {name}: it is not set here", remedy=f"export {name}=...")
    return {name: os.environ[name] for name in (*PASSED, *names) if name in os.environ}


def connect(address: str | None) -> JobSubmissionClient:
    """Return a client of a cluster's job API.

    Args:
        address: The dashboard's, such as "http://127.0.0.1:8265" or "head:8265"; default:
            $RAY_API_SERVER_ADDRESS, or this machine's.

    Raises:
        ResourceError: Nothing answers there, it is no Ray cluster, or it refuses the token.
    """
    url = dashboard_url(address or os.environ.get(ADDRESS) or LOCAL)
    token = authentication()
    if token.status == "fail":
        raise ResourceError(token.detail, remedy=token.remedy)
    _knock(url)
    logging.getLogger("ray.dashboard.modules").setLevel(logging.ERROR)
    with _answers(url), _environment(ADDRESS, url):
        return JobSubmissionClient(url)


def dashboard_url(address: str) -> str:
    """Return a dashboard's URL, with scheme and port.

    Raises:
        SpecError: It is no address of a dashboard.
    """
    url = address if "://" in address else f"http://{address}"
    remedy = f"give the dashboard's, such as {LOCAL}"
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 8265)
    except ValueError:  # a port that is no number
        raise SpecError(f"no address: {address!r}", where="--address", remedy=remedy) from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SpecError(f"no address of a dashboard: {address!r}", where="--address", remedy=remedy)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}:{port}"


def in_the_clear(url: str) -> bool:
    """Return whether the token would travel unencrypted over a network."""
    parts = urlsplit(dashboard_url(url))
    return parts.scheme == "http" and parts.hostname not in ("127.0.0.1", "localhost", "::1")


def submit(client: JobSubmissionClient, job: Job, say: Say) -> str:
    """Send a job and return its id.

    Args:
        client: Of the cluster.
        job: What to run.
        say: Told of the upload's size and of the names (never values) of what is passed on.

    Raises:
        ResourceError: The upload is too large, or the cluster refuses it.
    """
    upload = measure_upload(job.working_dir, job.excludes)
    if not upload.fits:
        what = f"the upload is too large ({upload}; largest: {upload.largest})"
        remedy = "list what the job does not need in .rayignore, or give --exclude"
        raise ResourceError(what, where=str(job.working_dir), remedy=remedy)
    say(f"upload: {upload}")
    if job.env:
        say(f"passed on from the environment: {', '.join(sorted(job.env))}")
    runtime_env = {
        "working_dir": str(job.working_dir),
        "excludes": list(job.excludes),
        "env_vars": dict(job.env or {}),
    }
    with _answers(client.get_address()):
        entrypoint = shlex.join(job.command)
        return str(client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env))


def follow(client: JobSubmissionClient, job: str, say: Say) -> Ending:
    """Hand a job's log to `say` as it grows, until the job ends; return how it ended.

    Raises:
        ResourceError: The cluster does not answer, for a minute; the job may go on.
    """
    with _answers(client.get_address(), job):
        asyncio.run(_tail(client, job, say))
        return _answered(lambda: _ending(client, job))


def stop(client: JobSubmissionClient, job: str, patience: float = 60.0) -> Ending:
    """Stop a job and wait until it has; one that has ended already stays as it ended.

    Raises:
        ResourceError: There is no such job, or it does not stop in time (seconds).
    """
    with _answers(client.get_address(), job):
        client.stop_job(job)
        deadline = time.monotonic() + patience
        while not client.get_job_status(job).is_terminal():
            if time.monotonic() > deadline:
                remedy = "look at it on the dashboard"
                raise ResourceError(f"job {job} has not stopped in {patience:.0f} s", remedy=remedy)
            time.sleep(0.2)
        return _ending(client, job)


async def _tail(client: JobSubmissionClient, job: str, say: Say) -> None:
    shown = 0
    while True:
        place = 0  # each time the log is sent from its beginning
        try:
            async for text in client.tail_job_logs(job):
                if fresh := text[max(0, shown - place) :]:
                    say(fresh)
                place += len(text)
                shown = max(shown, place)
        except (RuntimeError, OSError, aiohttp.ClientError):  # it broke: the job goes on
            pass
        if _answered(lambda: client.get_job_status(job)).is_terminal():
            return
        await asyncio.sleep(1.0)


def _answered(ask: Callable[[], T]) -> T:
    """Return the cluster's answer; one that is away is asked again for `AWAY_SECONDS`."""
    deadline = time.monotonic() + AWAY_SECONDS
    while True:
        try:
            return ask()
        except OSError:  # also what `requests` raises
            if time.monotonic() > deadline:
                raise
        time.sleep(AGAIN_SECONDS)


def _ending(client: JobSubmissionClient, job: str) -> Ending:
    told = client.get_job_info(job)
    code = 0 if told.status == JobStatus.SUCCEEDED else told.driver_exit_code or 1
    message = (told.message or "").strip().splitlines()
    return Ending(str(told.status), code, message[0] if message else "")


def _knock(url: str) -> None:
    """See that something listens: Ray's own requests have no time limit."""
    parts = urlsplit(url)
    try:
        socket.create_connection((str(parts.hostname), parts.port or 0), CONNECT_SECONDS).close()
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = "start the cluster, or give its dashboard's --address (`ray dashboard` tunnels it)"
        raise ResourceError(f"nothing answers at {url} ({reason})", remedy=remedy) from None


@contextmanager
def _answers(url: str, job: str = "") -> Iterator[None]:
    """Turn what Ray's client raises into one sentence."""
    try:
        yield
    except AuthenticationError:
        remedy = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with its token"
        raise ResourceError(f"the cluster at {url} refuses the token", remedy=remedy) from None
    except (RuntimeError, ValueError, KeyError, OSError, aiohttp.ClientError) as error:
        text = f"{error}".strip().splitlines()[0] if f"{error}".strip() else type(error).__name__
        if job and "404" in text:
            remedy = "`ray job list` names them"
            raise ResourceError(f"no job {job!r} at {url}", remedy=remedy) from None
        remedy = "is it a Ray dashboard, of Ray's own version here?"
        raise ResourceError(f"no answer to use from {url} ({text})", remedy=remedy) from None


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
