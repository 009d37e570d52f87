"""Storage that fails for a moment: tried again with growing pauses, and then said in one sentence.

What does not pass by waiting (a missing file, no permission, a full disk) is raised at once.
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from qresafe.errors import ResourceError

PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # seconds between tries, each shortened by up to a half
NUMBERS = {
    errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET,
    errno.ECONNREFUSED, errno.ECONNABORTED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EPIPE,
}  # fmt: skip
# Clients of object stores whose errors are no OSErrors, and what those are called.
CLIENTS = {"aiohttp", "azure", "botocore", "gcsfs", "google", "requests", "s3fs", "urllib3"}
NAMES = ("Connect", "Timeout", "Disconnected", "Transport", "Payload", "HTTPClient")

T = TypeVar("T")


def patiently(action: Callable[[], T], where: object) -> T:
    """Return what `action` does, trying again while it fails for reasons that may pass.

    Args:
        action: May be done twice: a server that failed may have done it.
        where: The file, for the sentence.

    Raises:
        ResourceError: It failed to the end; half a minute at most was spent on waiting.
    """
    for pause in PAUSES:
        try:
            return action()
        except Exception as error:
            if not passes(error):
                raise
        time.sleep(pause * random.uniform(0.5, 1.0))
    try:
        return action()
    except Exception as error:
        if not passes(error):
            raise
        raise not_answering(error, where) from error


def not_answering(error: BaseException, where: object) -> ResourceError:
    """Return the sentence for storage that failed for too long."""
    said = " ".join(str(error).split())[:200] or type(error).__name__
    remedy = "see that it is there, and run again: what is finished is kept"
    return ResourceError(f"the storage does not answer ({said})", where=str(where), remedy=remedy)


def passes(error: BaseException) -> bool:
    """Return whether an error is a server's or network's that may be gone the next time."""
    library, name = type(error).__module__.partition(".")[0], type(error).__name__
    status = _status(error) if library in CLIENTS else None
    if status is not None:
        return status >= 500 or status in (408, 429)
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in NUMBERS
    return library in CLIENTS and any(part in name for part in NAMES)


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that an error tells of, whichever client raised it."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return found if isinstance(found, int) else None
    for holder in (error, response):
        for name in ("status", "status_code", "code"):
            found = getattr(holder, name, None)
            if isinstance(found, int) and 100 <= found < 600:
                return found
    return None
