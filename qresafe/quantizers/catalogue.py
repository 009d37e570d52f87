"""What `qresafe quantizers` tells of every method, and of formats that are only read."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from qresafe.loading import read_yaml

FILE = Path(__file__).with_name("catalogue.yaml")


class Entry(BaseModel):
    """One method or format.

    Attributes:
        title: Its name for people.
        widths: What it stores a weight in.
        format: Of the checkpoint.
        loads: What runs such checkpoints, by their own documentation.
        calibration: What it does with a calibration set.
        patch: What a patch can change, or why nothing.
        ran: The hardware on which it really ran, by this project's tests or benchmarks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    widths: str
    format: str
    loads: tuple[str, ...]
    calibration: str
    patch: str
    ran: str


@cache
def catalogue() -> dict[str, Entry]:
    """Return the entries by name, methods first."""
    data = read_yaml(FILE.read_text())
    return {
        name: Entry.model_validate(told) for part in data.values() for name, told in part.items()
    }
