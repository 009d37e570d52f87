"""The errors that a user's mistake ends in: one sentence that says what, where and how to mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can mend; the command line prints it without a traceback.

    Args:
        what: What is wrong, with the offending value.
        where: The file, key, row or model that it was found in.
        remedy: What to do about it, as an imperative.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(self._sentence())

    def __reduce__(self) -> tuple[object, ...]:
        # Ray pickles errors across processes; keyword arguments need spelling out.
        return (_rebuild, (type(self), self.what, self.where, self.remedy))

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


def _rebuild(kind: type[UserError], what: str, where: str, remedy: str) -> UserError:
    return kind(what, where=where, remedy=remedy)


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
