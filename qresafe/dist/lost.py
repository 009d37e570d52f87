"""A cluster that goes away under a driver is said in one sentence, not in Ray's trace."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from ray.exceptions import RayError, RayTaskError

from qresafe.driving import abandon, forewarn
from qresafe.errors import ResourceError
from qresafe.integrity import tell

LOOK_SECONDS = 2.0
# Ray ends a driver without a word (exit code 1) when the head has not answered for so long. A
# head whose state was kept may come back until then, so the sentence is said shortly before.
RAYS_PATIENCE = "RAY_gcs_rpc_server_reconnect_timeout_s"
RAYS_SECONDS = 60.0
OURS = 0.85  # of Ray's
REMEDY = "see that the cluster is up and give the same command again: it goes on"


@contextmanager
def loss_told() -> Iterator[None]:
    """Turn what Ray raises when a node or the head is lost into one sentence.

    Raises:
        ResourceError: It was lost. What a task of ours raised stays as it is.
    """
    try:
        yield
    except RayTaskError:
        raise
    except RayError as error:
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        raise ResourceError(f"the Ray cluster was lost ({told})", remedy=REMEDY) from error


def watch_head() -> None:
    """From now on, end this process in one sentence when its cluster's head is lost.

    A thread looks whether the head answers, as long as this process belongs to its cluster.
    """
    address = ray.get_runtime_context().gcs_address
    patience = OURS * float(os.environ.get(RAYS_PATIENCE, RAYS_SECONDS))

    def watch() -> None:
        if lost(address, lambda: _joined(address), patience, lambda: _warn(address)):
            _leave(address, patience)

    threading.Thread(target=watch, name="head", daemon=True).start()


def lost(
    address: str, joined: Callable[[], bool], patience: float, silent_now: Callable[[], None]
) -> bool:
    """Wait until the head does not answer for `patience` seconds; False: we are `joined` no more.

    The time counts from the first look without an answer: a driver that was stopped itself has
    not looked. At that look `silent_now` is called.
    """
    silent: float | None = None
    while joined():
        if _answers(address):
            silent = None
        elif silent is None:
            silent = time.monotonic()
            silent_now()
        elif time.monotonic() - silent >= patience:
            return joined()
        time.sleep(LOOK_SECONDS)
    return False


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=LOOK_SECONDS):
            return True
    except OSError:
        return False


def _joined(address: str) -> bool:
    return bool(ray.is_initialized() and ray.get_runtime_context().gcs_address == address)


def _warn(address: str) -> None:
    """Say it at once, too: a new head that knows nothing of us has Ray abort this process."""
    error = ResourceError(f"the Ray cluster's head at {address} does not answer", remedy=REMEDY)
    forewarn(error)
    tell(str(error))


def _leave(address: str, patience: float) -> None:
    """Say that the head was lost, and end this process: whatever waits for Ray, waits for ever."""
    what = f"the Ray cluster was lost (its head has not answered for {patience:.0f} s)"
    error = ResourceError(what, where=address, remedy=REMEDY)
    abandon(error)
    print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(error.exit_code)
