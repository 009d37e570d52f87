"""A blinded sheet of completions for people to label, and the labels read back.

The sheet shows an id, the prompt and the answer, in a shuffled order: no model, no verdict. What
the ids stand for is in a key file beside it, which the labelling people need not get.
"""

from __future__ import annotations

import csv
import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from qresafe.errors import DataError, nearest
from qresafe.records import Outcome
from qresafe.stages.runtime import Row

COLUMNS = ("id", "prompt", "completion")
LABELS = tuple(label for label in get_args(Outcome) if label != "undecided")
LABEL = "label"  # every column whose name starts so is one person's


class Item(BaseModel):
    """What one id of a sheet stands for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str  # label of the completions in `Key.sources`
    prompt_id: str
    sample: int
    digest: str  # of the completion, so that other completions are noticed


class Key(BaseModel):
    """The key file of a sheet: how to get from its ids back to the completions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int
    sources: dict[str, str]  # label -> path of the completions
    items: dict[str, Item]  # by id

    @model_validator(mode="after")
    def _sources_are_known(self) -> Key:
        if not {item.source for item in self.items.values()} <= set(self.sources):
            raise ValueError("an item's source has no path")
        return self


class Labels(BaseModel):
    """A sheet that people have filled in.

    Attributes:
        people: Column -> id -> label; ids without a label are left out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    people: dict[str, dict[str, str]]

    def consensus(self) -> dict[str, str]:
        """Return the label that most people gave; an id with a tie is left out."""
        votes: dict[str, Counter[str]] = {}
        for labels in self.people.values():
            for name, label in labels.items():
                votes.setdefault(name, Counter())[label] += 1
        ranked = {name: counted.most_common(2) for name, counted in votes.items()}
        return {
            name: best[0][0]
            for name, best in ranked.items()
            if len(best) == 1 or best[0][1] > best[1][1]
        }

    def ids(self) -> set[str]:
        """Return the ids that somebody labelled."""
        return {name for labels in self.people.values() for name in labels}


def key_path(sheet: Path) -> Path:
    """Return where the key of a sheet lies."""
    return sheet.with_suffix(".key.json")


def write_sheet(
    sheet: Path,
    completions: Mapping[str, Sequence[Row]],
    paths: Mapping[str, str],
    n: int,
    seed: int,
) -> Key:
    """Write a simple random sample of completions, and its key.

    Args:
        sheet: The CSV file to write; its key goes beside it.
        completions: Label -> rows of `records.COMPLETION`. Failed generations are not drawn.
        paths: Label -> where its completions lie.
        n: How many to draw; all, if there are fewer.
        seed: Draws and shuffles.

    Raises:
        DataError: The sheet exists already, or there is nothing to label.
    """
    if sheet.exists() or key_path(sheet).exists():
        remedy = "give another --out: a sheet may hold somebody's labels"
        raise DataError("the sheet or its key exists already", where=str(sheet), remedy=remedy)
    drawn = _drawn(completions, n, seed)
    if not drawn:
        raise DataError("no completion to label", where=", ".join(paths.values()))
    items, lines = {}, []
    for label, row in drawn:
        # A hash of the seed and the row: it tells nothing, and says the same in every run.
        name = _digest(f"{seed}/{label}/{row['prompt_id']}/{row['sample']}")[:10]
        items[name] = Item(
            source=label,
            prompt_id=row["prompt_id"],
            sample=row["sample"],
            digest=_digest(row["completion"]),
        )
        lines.append([name, _shown(row["prompt"]), _shown(row["completion"]), ""])
    sheet.parent.mkdir(parents=True, exist_ok=True)
    key = Key(seed=seed, sources=dict(paths), items=items)
    key_path(sheet).write_text(key.model_dump_json(indent=1), "utf-8")
    with sheet.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([[*COLUMNS, LABEL], *lines])
    return key


def read_key(path: Path) -> Key:
    """Read a key file.

    Raises:
        DataError: It is missing or malformed.
    """
    try:
        return Key.model_validate_json(path.read_text("utf-8"))
    except FileNotFoundError:
        remedy = "give the file that `qresafe judge sheet` wrote beside the sheet, by --key"
        raise DataError("no such key file", where=str(path), remedy=remedy) from None
    except (ValidationError, UnicodeDecodeError):
        raise DataError("not the key of a sheet", where=str(path)) from None


def read_sheet(sheet: Path, key: Key) -> Labels:
    """Read people's labels, and check them.

    Args:
        sheet: The CSV file. Every column whose name starts with "label" is one person's; an
            empty cell is no label. Case and spaces do not matter.
        key: The sheet's key.

    Raises:
        DataError: The file is missing or malformed, an id is unknown or there twice, a label is
            none of `LABELS`, or there is no label at all.
    """
    lines = list(_lines(sheet))
    header = list(lines[0][1]) if lines else []
    columns = [name for name in header if name and name.startswith(LABEL)]
    if not columns or "id" not in header:
        remedy = "keep its lines and the columns id and label, one label column for each person"
        raise DataError("no line, or no column id or label", where=str(sheet), remedy=remedy)
    people: dict[str, dict[str, str]] = {column: {} for column in columns}
    seen: set[str] = set()
    for number, line in lines:
        where = f"{sheet}, line {number}"
        name = (line["id"] or "").strip()
        if name not in key.items or name in seen:
            what = "repeats an id" if name in seen else "has an id that is not in the key"
            raise DataError(f"the line {what} ({name!r})", where=where, remedy="restore the line")
        seen.add(name)
        for column in columns:
            if label := _label(line[column], where):
                people[column][name] = label
    if not any(people.values()):
        raise DataError("no label", where=str(sheet), remedy=f"write one of {', '.join(LABELS)}")
    return Labels(people={column: found for column, found in people.items() if found})


def check_unchanged(key: Key, completions: Mapping[tuple[str, str, int], str]) -> None:
    """Refuse labels whose completions are no longer what people saw.

    Args:
        key: The sheet's key.
        completions: (source, prompt_id, sample) -> completion.

    Raises:
        DataError: A completion is gone or differs.
    """
    for name, item in key.items.items():
        text = completions.get((item.source, item.prompt_id, item.sample))
        if text is None or _digest(text) != item.digest:
            raise DataError(
                f"the completion behind id {name} is {'gone' if text is None else 'another one'}",
                where=key.sources[item.source],
                remedy="give the completions that the sheet was made of",
            )


def _drawn(completions: Mapping[str, Sequence[Row]], n: int, seed: int) -> list[tuple[str, Row]]:
    rows = [(label, row) for label in completions for row in completions[label]]
    whole = [(label, row) for label, row in rows if not row["error"]]
    return random.Random(seed).sample(whole, min(n, len(whole)))


def _lines(sheet: Path) -> Iterator[tuple[int, dict[str, str | None]]]:
    try:
        with sheet.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            for line in reader:
                yield reader.line_num, line
    except FileNotFoundError:
        raise DataError("no such sheet", where=str(sheet), remedy="give a CSV file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        remedy = "save it as CSV in UTF-8"
        raise DataError(f"not a sheet ({error})", where=str(sheet), remedy=remedy) from None


def _label(cell: str | None, where: str) -> str:
    label = (cell or "").strip().lower()
    if label and label not in LABELS:
        raise DataError(f"unknown label {cell!r}", where=where, remedy=nearest(label, LABELS))
    return label


def _shown(text: str) -> str:
    # A spreadsheet would compute what starts so, and a model may have written it.
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
