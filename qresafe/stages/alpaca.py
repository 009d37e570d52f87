"""AlpacaEval: annotations by an endpoint or from a file, and the win rates that follow."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from upath import UPath

from qresafe.artifacts import Artifact, Run, content_key, write_text
from qresafe.errors import DataError, nearest
from qresafe.hf.tables import read_table
from qresafe.judge_specs import EndpointSpec
from qresafe.judges import alpaca as rules
from qresafe.judges.length_control import Gamed, length_controlled
from qresafe.progress import Progress
from qresafe.stages.asking import AskJob, ask_all, cache_folder, usage, usage_note
from qresafe.stages.runtime import Row, Runtime

CODE_VERSION = 1
FILE = "annotations.json"
GAMED = ("index", "preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline")


def annotate(
    run: Run,
    outputs: Sequence[Row],
    references: Sequence[Row],
    spec: EndpointSpec,
    runtime: Runtime,
    progress: Progress,
    *,
    probabilities: bool = True,
) -> Artifact:
    """Ask an endpoint which of two outputs is better, for every instruction.

    Args:
        run: Where the result goes.
        outputs: The model's, as `read_outputs` returns them.
        references: The reference's; their instructions and order count.
        spec: The annotator.
        runtime: Where to ask.
        progress: Told of every finished batch.
        probabilities: Ask for those of "m" and "M"; else the text decides.

    Returns:
        The artefact with annotations.json in `alpaca_eval`'s format: preference is null, and
        `error` says why, where the annotator failed.

    Raises:
        DataError: An instruction has no output.
        ModelError: The key is refused.
    """
    rows = _paired(outputs, references)
    likeliest = rules.LIKELIEST if probabilities else 0

    def work(folder: UPath) -> Mapping[str, Any]:
        progress.start("alpaca-eval", len(rows), "annotations")
        share = 1 / max(1, runtime.workers)
        job = AskJob(spec, cache_folder(run, spec), share=share, likeliest=likeliest)
        questions = [_question(row) for row in rows]
        said = ask_all(job, questions, folder / "work" / "parts", runtime, progress)
        made = [_annotated(row, reply, spec) for row, reply in zip(rows, said, strict=True)]
        write_text(folder / FILE, json.dumps(made, indent=1))
        counts = usage(said, spec)
        progress.finish(usage_note(counts))
        return counts

    return run.stage(
        "alpaca",
        spec=spec.model_dump(mode="json", exclude=set(spec.PATIENCE)) | {"likeliest": likeliest},
        inputs={"pairs": content_key(rows)},
        code_version=CODE_VERSION,
        work=work,
    )


def read_outputs(path: Path) -> list[Row]:
    """Read outputs in `alpaca_eval`'s format: a JSON list of instruction, output, generator.

    Raises:
        DataError: The file is malformed or empty, or an instruction occurs twice.
    """
    rows = _read_list(path, ("instruction", "output"))
    kept = [{"generator": path.stem} | row for row in rows]
    if len({row["instruction"] for row in kept}) < len(kept):
        raise DataError("an instruction occurs twice", where=str(path), remedy="drop one of them")
    return kept


def read_annotations(path: Path | UPath) -> list[Row]:
    """Read annotations in `alpaca_eval`'s format; a preference may be null.

    Raises:
        DataError: The file is malformed or empty, or a preference is no number.
    """
    rows = _read_list(path, ("preference",), nullable=("preference",))
    for place, row in enumerate(rows):
        if not isinstance(row["preference"], int | float | None):
            what = f"preference {row['preference']!r} is no number"
            raise DataError(what, where=f"{path}, entry {place}", remedy="1 to 2, or null")
    return rows


def read_gamed(path: Path) -> Gamed:
    """Read the published df_gamed.csv (the data set tatsu-lab/alpaca_eval on the hub).

    Raises:
        DataError: The file is missing or malformed.
    """
    table = read_table(str(path))
    for name in GAMED:
        if name not in table.column_names:
            remedy = nearest(name, table.column_names)
            raise DataError(f"no column {name!r}", where=str(path), remedy=remedy)
    try:
        columns = {
            name: np.array(
                [np.nan if value is None else float(value) for value in table[name].to_pylist()]
            )
            for name in GAMED
        }
    except (TypeError, ValueError) as error:
        raise DataError(f"not a number ({error})", where=str(path)) from None
    index, preference, delta, difficulty, own = (columns[name] for name in GAMED)
    return Gamed(index.astype(np.int64), preference, delta, difficulty, own)


def summarize(annotations: Sequence[Row], gamed: Gamed | None) -> dict[str, Any]:
    """Return the win rates of annotations.

    Args:
        annotations: As `read_annotations` returns them.
        gamed: What the length-controlled rate needs; None: it is left out.

    Raises:
        DataError: The length-controlled rate cannot be computed.
    """
    preferences = [row["preference"] for row in annotations]
    found: dict[str, Any] = dict(rules.win_rate(preferences))
    if gamed is None:
        return found
    numbers = rules.as_array(preferences)
    numbers = np.where((numbers >= 1) & (numbers <= 2), numbers, np.nan)
    index = [int(row.get("index", place)) for place, row in enumerate(annotations)]
    controlled = length_controlled(index, numbers, _lengths(annotations), gamed)
    names = ("length", "difficulty", "model")
    return found | {
        "length_controlled_winrate": controlled.win_rate,
        "weights": dict(zip(names, controlled.weights, strict=True)),
        "C": controlled.strength,
    }


def _lengths(annotations: Sequence[Row]) -> tuple[list[int], list[int]]:
    for place, row in enumerate(annotations):
        if not all(isinstance(row.get(name), str) for name in ("output_1", "output_2")):
            what = "output_1 or output_2 is missing"
            remedy = "the length-controlled rate needs both outputs' lengths"
            raise DataError(what, where=f"annotation {place}", remedy=remedy)
    return (
        [len(row["output_1"]) for row in annotations],
        [len(row["output_2"]) for row in annotations],
    )


def _read_list(
    path: Path | UPath, needed: Sequence[str], nullable: Sequence[str] = ()
) -> list[Row]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise DataError("no such file", where=str(path), remedy="give a JSON file") from None
    except ValueError as error:
        raise DataError(f"malformed JSON ({error})", where=str(path)) from None
    if not isinstance(data, list) or not data:
        remedy = "give alpaca_eval's format, a list of objects"
        raise DataError("no list of entries", where=str(path), remedy=remedy)
    for place, row in enumerate(data):
        for name in needed:
            absent = not isinstance(row, dict) or name not in row
            if absent or (name not in nullable and not isinstance(row[name], str)):
                where = f"{path}, entry {place}"
                raise DataError(f"no {name}", where=where, remedy="give alpaca_eval's format")
    return data


def _paired(outputs: Sequence[Row], references: Sequence[Row]) -> list[Row]:
    known = {row["instruction"]: row for row in outputs}
    rows = []
    for place, reference in enumerate(references):
        made = known.get(reference["instruction"])
        if made is None:
            what = f"no output for instruction {place}, {reference['instruction'][:60]!r}"
            raise DataError(what, where="the outputs", remedy="answer all the reference's")
        rows.append(
            {
                "index": place,
                "instruction": reference["instruction"],
                "output_1": reference["output"],
                "generator_1": reference["generator"],
                "output_2": made["output"],
                "generator_2": made["generator"],
            }
        )
    return rows


def _question(row: Row) -> Row:
    shown = (row["output_1"], row["output_2"])
    if rules.is_swapped(row["instruction"]):
        shown = shown[::-1]
    return {"id": str(row["index"]), "messages": rules.messages(row["instruction"], *shown)}


def _annotated(row: Row, reply: Row, spec: EndpointSpec) -> Row:
    found: Row = {"annotator": spec.model, "preference": None}
    if reply["error"]:
        return row | found | {"error": reply["error"]}
    swapped = rules.is_swapped(row["instruction"])
    found["preference"] = rules.preference(reply["answer"], swapped=swapped)
    if found["preference"] is None:
        found["error"] = "malformed answer of the annotator"
    return row | found | {"raw_completion": reply["answer"]}
