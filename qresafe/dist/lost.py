"""A cluster that goes away under a driver is said in one sentence, not in Ray's trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray.exceptions import RayError, RayTaskError

from qresafe.errors import ResourceError


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
        remedy = "see that the cluster is up and give the same command again: it goes on"
        raise ResourceError(f"the Ray cluster was lost ({told})", remedy=remedy) from error
