"""How stages tell a person what they are doing, without knowing how it is shown."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the state of the running stage; every call is cheap and may be ignored."""

    def start(self, stage: str, total: int | None = None, unit: str = "") -> None:
        """A stage (or part of one) begins; `total` units of work lie ahead, if known."""

    def advance(self, done: int = 1, note: str = "") -> None:
        """`done` more units are finished; `note` is a short live figure ("312 tok/s")."""

    def finish(self, note: str = "", reused: bool = False) -> None:
        """The running stage ended; `reused` says that an earlier run had made its result."""


class Silent:
    """A `Progress` that shows nothing."""

    def start(self, stage: str, total: int | None = None, unit: str = "") -> None:
        pass

    def advance(self, done: int = 1, note: str = "") -> None:
        pass

    def finish(self, note: str = "", reused: bool = False) -> None:
        pass
