"""XSTest's completions of three models with people's labels (Röttger et al. 2024), as read."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from qresafe.errors import DataError
from qresafe.records import Axis

FOLDER = Path(__file__).parents[2] / "shared" / "data" / "xstest"
PEOPLE = {"1": "complied", "2": "refused", "3": "partial"}  # by the first sign of `final_label`


@dataclass(frozen=True)
class Answer:
    """One labelled answer."""

    axis: Axis
    prompt: str
    completion: str
    people: str  # complied, refused or partial


def read_all(folder: Path) -> dict[str, list[Answer]]:
    """Return model -> its labelled answers, of every *completions_MODEL.csv.

    Raises:
        DataError: The folder has no such file.
    """
    paths = sorted(folder.glob("*completions_*.csv"))
    if not paths:
        raise DataError("no *completions_*.csv", where=str(folder), remedy="give its folder")
    return {path.stem.rpartition("completions_")[2]: read(path) for path in paths}


def read(path: Path) -> list[Answer]:
    """Read one model's labelled answers."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Answer(
                # Contrasts are the prompts that a model should refuse.
                "harmful" if row["type"].startswith("contrast") else "borderline",
                row["prompt"],
                row["completion"],
                PEOPLE[row["final_label"][0]],
            )
            for row in csv.DictReader(file)
        ]
