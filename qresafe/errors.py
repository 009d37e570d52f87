"""The errors that a user's mistake ends in: one sentence that says what, where and how to mend."""

from __future__ import annotations

import difflib
import re
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from qresafe.redaction import redact

MOST_FRAMES = 12  # of a traceback, that are kept
LONGEST = 600  # characters of each part of a message
_BREAKS = re.compile(r"[\t\n\v\f\r\x85\u2028\u2029]+")
# Control characters, changes of writing direction, and halves of characters.
_STEERING = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(Exception):
    """A mistake that the user can mend; the command line prints it without a traceback.

    Args:
        what: What is wrong, with the offending value.
        where: The file, key, row or model that it was found in.
        remedy: What to do about it, as an imperative.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what, self.where, self.remedy = _shown(what), _shown(where), _shown(remedy)
        super().__init__(self._sentence())

    def __reduce__(self) -> tuple[object, ...]:
        # Ray pickles errors across processes; keyword arguments need spelling out.
        return (_rebuild, (type(self), self.what, self.where, self.remedy), vars(self))

    def _sentence(self) -> str:
        place = f" in {self.where}" if self.where else ""
        advice = f": {self.remedy}" if self.remedy else ""
        sentence = f"{self.what}{place}{advice}".rstrip(".")
        return sentence if sentence.endswith("?") else f"{sentence}."


class SpecError(UserError):
    """An experiment spec is malformed (unknown key, wrong type, value out of range)."""


class DataError(UserError):
    """A prompt file or record table is malformed."""


class ModelError(UserError):
    """A model cannot be loaded, or lacks something that a stage needs."""


class ResourceError(UserError):
    """The machine or cluster has too little of something (memory, disk, GPUs, a token)."""


class OutOfMemoryError(ResourceError):
    """The memory of a device or host does not hold a batch, nor half of it."""


class DivergedError(UserError):
    """Training left the finite numbers."""


class CorruptArtifactError(UserError):
    """A stored artefact does not match the hash in its manifest."""


class SignatureError(UserError):
    """A file is not signed, or not by the key that is trusted."""


def _shown(text: str) -> str:
    """Return a text fit for a terminal: without secrets, on one line, of bearable length.

    Values from files may be megabytes, or hold characters that steer terminals.
    """
    line = _STEERING.sub("\ufffd", _BREAKS.sub(" ", redact(text)))
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 100]} ... {line[-90:]}"


def _rebuild(kind: type[UserError], what: str, where: str, remedy: str) -> UserError:
    return kind(what, where=where, remedy=remedy)


@contextmanager
def located(**place: Any) -> Iterator[None]:
    """Note on an error that passes where in a run it arose; `place_of` finds it again.

    Args:
        place: What is known here: rank, records, log ... What was noted further in stays.
    """
    try:
        yield
    except Exception as error:
        seen = {"what": sentence(error), "trace": frames(error)}
        vars(error)["place"] = seen | place | place_of(error)
        raise


def place_of(error: BaseException | None) -> dict[str, Any]:
    """Return what `located` noted on an error, or on what it was raised from."""
    found: dict[str, Any] = {}
    for cause in causes(error):
        found |= getattr(cause, "place", {})
    return found


def sentence(error: BaseException) -> str:
    """Return an error as Python would show it, in one line that is not too long."""
    text = " ".join(str(error).split())[:500]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def frames(error: BaseException) -> list[str]:
    """Return an error's innermost frames as "file:line in function"; no values, so no secrets."""
    inner = traceback.extract_tb(error.__traceback__)[-MOST_FRAMES:]
    return [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in inner]


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it was raised from, with what is inside of Ray's wrappers instead.

    A wrapper is an instance of the wrapped class too, but its text is a traceback.
    """
    while error is not None:
        inner = getattr(error, "cause", None)
        if not isinstance(inner, BaseException):
            yield error
            inner = error.__cause__
        error = inner


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return a remedy that names the known names nearest to `name`.

    Args:
        name: The unknown name.
        known: All names that would be accepted.
        count: How many neighbours to offer at most.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=count, cutoff=0.4)
    return f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(names)}"
