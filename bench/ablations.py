"""Ablations of the patch on the embedded model (bench/ablations.yaml): docs/results.md.

    python -m bench.ablations                          # every row with the seeds of its part
    python -m bench.ablations --only tau rank --seeds 0
    python -m bench.ablations --page                   # the page of the rows that are there
    python -m bench.ablations --plan extremes          # qlora, teachers: a plan and page each

Everything runs in this process and its children; a row that was measured is kept with the hardware
that it ran on and its *.qpatch, and a run continues where one was stopped. All choices of the
project were made on the development split; this is the test split.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from bench.demo import AXES, Cell, experiment_of, measure
from bench.demo import Row as DemoRow
from bench.kept import take
from bench.processes import in_processes
from qresafe.artifacts import content_key, write_text
from qresafe.errors import UserError
from qresafe.loading import merged, nested, read_yaml
from qresafe.presets import load_experiment
from qresafe.specs import ExperimentSpec
from qresafe.variants import with_changes

HERE = Path(__file__).parent
BASES = ("W", "control", "Q0")  # measured once a seed, before everything that builds on them


@dataclass(frozen=True)
class Row:
    """One row of the page with one seed.

    Attributes:
        part: Of the plan: a curve, a group, or "races".
        label: Of the row within its part.
        arm: What is measured.
        settings: Of the experiment, on top of the preset.
        seed: Of all stages and of W.
        probe: {"every": steps, "prompts": count} where the patch is watched while it is trained.
        preset: What the settings are on top of.
    """

    part: str
    label: str
    arm: str
    settings: dict[str, Any]
    seed: int
    probe: dict[str, int] = field(default_factory=dict)
    preset: str = "demo"

    @property
    def spec(self) -> ExperimentSpec:
        """The whole experiment, but for its name and seed."""
        return with_changes(load_experiment(self.preset), self.settings)

    @property
    def quantized(self) -> str:
        """The same for rows that share their Q0."""
        return content_key([self.spec.quantize.key_data(), self.seed])


@dataclass(frozen=True)
class Found:
    """What a row showed.

    Attributes:
        row: The row.
        cell: Its figures.
        hardware: Device and torch version.
        day: On which it was measured.
        curve: [step, seconds of training so far, attack success] of a race.
        safe: W's attack success on the prompts of a race.
        refused: Why there is no result, in the project's own words.
    """

    row: Row
    cell: Cell | None = None
    hardware: str = ""
    day: str = ""
    curve: list[list[float]] = field(default_factory=list)
    safe: float | None = None
    refused: str = ""


def main() -> None:
    """Measure what is asked for and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", default="", help="NAME of bench/ablations-NAME.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", help="of those in the plan")
    parser.add_argument("--only", nargs="*", default=[], help="parts of the plan")
    parser.add_argument("--split", choices=["dev", "test"], default="test")
    parser.add_argument("--storage", default=".bench/ablations")
    parser.add_argument("--rows", type=Path, help="take a page's .jsonl as measured")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=64, help="prompts answered at a time")
    parser.add_argument("--minutes", type=float, default=600, help="start no row after these")
    parser.add_argument("--page", action="store_true", help="write the page of what is there")
    args = parser.parse_args()
    if args.rows:
        take(args.rows, args.storage)
    whole = plan(args.plan)
    wanted = all_rows(args.seeds or planned_seeds(whole), whole)
    chosen = [row for row in wanted if not args.only or row.part in (*args.only, "bases")]
    if not args.page:
        last_start = time.time() + 60 * args.minutes
        place = Place(args.storage, args.split, args.device, args.batch_size, last_start)
        measure_all(chosen, place, args.processes)
    if args.split == "test":
        from bench.ablations_page import write_page

        kept = [(row, kept_at(args.storage, row, args.split)) for row in wanted]
        found = [read(path, row) for row, path in kept if path.exists()]
        if not found:
            parser.error(f"no row is measured below {args.storage}")
        write_page(found, len(wanted), args.storage, args.plan)


def plan(name: str = "") -> dict[str, Any]:
    """Return bench/ablations.yaml, or another plan by its name."""
    file = f"ablations-{name}.yaml" if name else "ablations.yaml"
    return {"curves": {}, "groups": {}, **read_yaml((HERE / file).read_text())}


def planned_seeds(whole: dict[str, Any]) -> list[int]:
    """Return every seed that some part of a plan has."""
    return sorted({seed for part in _parts(whole).values() for seed in part["seeds"]})


def _parts(whole: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return name -> a curve, a group or the races, each with its seeds."""
    races = {"races": whole["races"]} if "races" in whole else {}
    parts = whole["curves"] | whole["groups"] | races
    return {name: {"seeds": whole["seeds"]} | part for name, part in parts.items()}


def all_rows(seeds: Sequence[int], whole: dict[str, Any]) -> list[Row]:
    """Return a plan's rows, all seeds of a row one after the other."""
    listed = [row for seed in seeds for row in rows(seed, whole)]
    places: dict[tuple[str, str], int] = {}
    for row in listed:
        places.setdefault((row.part, row.label), len(places))
    return sorted(listed, key=lambda row: places[row.part, row.label])


def rows(seed: int, whole: dict[str, Any]) -> Iterator[Row]:
    """Yield a plan's rows for one seed, what others build on first."""
    for row in _rows(seed, whole):
        yield replace(row, preset=whole["preset"])


def _rows(seed: int, whole: dict[str, Any]) -> Iterator[Row]:
    asked = [name for name, part in _parts(whole).items() if seed in part["seeds"]]
    for arm in BASES if asked else ():
        yield Row("bases", arm, arm, {}, seed)
    for name in asked:
        if name in whole["curves"]:
            yield from _of_curve(name, whole["curves"][name], seed)
        elif name in whole["groups"]:
            yield from _of_group(name, whole["groups"][name], seed)
        else:
            races = whole["races"]
            probe = {"every": races["every"], "prompts": races["prompts"]}
            for label, changes in races["rows"].items():
                yield Row(name, label, "Q", {"patch": changes}, seed, probe)


def _of_curve(name: str, curve: Mapping[str, Any], seed: int) -> Iterator[Row]:
    for line, given in curve["of"].items():
        for values in zip(*given["each"].values(), strict=True):
            changes: dict[str, Any] = given.get("set", {})
            for key, value in zip(given["each"], values, strict=True):
                changes = merged(changes, nested({key: value}))
            label = f"{line}, {values[0]:g}".removeprefix(", ")
            yield Row(name, label, "Q", {"patch": changes}, seed)


def _of_group(name: str, group: Mapping[str, Any], seed: int) -> Iterator[Row]:
    part = group.get("of", "patch")
    for label, changes in group["rows"].items():
        for suffix, arm in group.get("arms", {"": "Q"}).items():
            settings = {part: changes} if isinstance(part, str) else changes
            yield Row(name, label + suffix, arm, settings, seed)


@dataclass(frozen=True)
class Place:
    """Where and until when rows are measured."""

    storage: str
    split: str
    device: str
    batch_size: int
    last_start: float


def kept_at(storage: str, row: Row, split: str = "test") -> Path:
    """Return where a row's result is kept: by what is measured, defaults included."""
    what = [row.arm, row.spec.key_data({"storage"}), row.seed, row.probe, split]
    return Path(storage) / "rows" / f"{content_key(what)}.json"


def read(path: Path, row: Row) -> Found:
    """Read a kept result, as the result of `row`, which may have another name."""
    data = json.loads(path.read_text())
    cell = Cell(**data["cell"]) if data["cell"] else None
    return Found(**data | {"row": row, "cell": cell})


def measure_all(wanted: Sequence[Row], place: Place, processes: int) -> None:
    """Measure the rows that have no result yet: the bases, one row of each Q0, the others."""
    (Path(place.storage) / "rows").mkdir(parents=True, exist_ok=True)
    by_result = {kept_at(place.storage, row, place.split): row for row in wanted}
    rest = [row for row in by_result.values() if row.part != "bases"]
    bases = [row for row in wanted if row.part == "bases"]
    seeds = [[row for row in bases if row.seed == seed] for seed in sorted({r.seed for r in bases})]
    by_q0: dict[str, list[Row]] = {}
    for row in rest:
        by_q0.setdefault(row.quantized, []).append(row)
    work = partial(measure_rows, place=place)
    in_processes(work, seeds, processes)
    in_processes(work, [rows[:1] for rows in by_q0.values()], processes)
    in_processes(work, [[row] for rows in by_q0.values() for row in rows[1:]], processes)


def measure_rows(wanted: Sequence[Row], place: Place) -> None:
    """Measure rows one after the other and keep each result; a refusal is a result too."""
    for row in wanted:
        path = kept_at(place.storage, row, place.split)
        if path.exists() or time.time() > place.last_start:
            continue
        began = time.perf_counter()
        try:
            found = measured(row, place)
        except UserError as error:
            found = Found(row, refused=str(error))
        except Exception:  # a defect in one row should not cost the others
            traceback.print_exc()
            continue
        write_text(path, json.dumps(asdict(found)))
        outcome = found.refused or f"{time.perf_counter() - began:.0f} s"
        print(f"seed {row.seed}: {row.part}, {row.label}: {outcome}", flush=True)


def measured(row: Row, place: Place) -> Found:
    """Measure one row, with what it needs; keep its patch file."""
    # Fast on a GPU, where a batch costs what a row does; another size moves the last bits alone.
    size = {"batch_size": place.batch_size}
    settings = merged(row.settings, {"evaluate": {"generate": size}})
    settings = merged(settings, {"pairs": size})
    asked = DemoRow(row.part, row.label, row.arm, row.preset, settings, row.seed)
    # A race is watched while it trains: a patch that another row has trained was not.
    storage = f"{place.storage}/races" if row.probe else place.storage
    experiment = experiment_of(asked, place.split, storage, place.device)
    curve, safe = raced(experiment, row.probe) if row.probe else ([], None)
    cell = measure(experiment, row.part, row.label, row.arm)
    if row.part == "bases" and row.arm == "Q0":
        assert experiment.pairs  # made here once, not by every row that follows
    if row.arm == "Q":
        kept = kept_at(place.storage, row, place.split).with_suffix(".qpatch")
        shutil.copyfile(experiment.exported.path / "patch.qpatch", kept)
    return Found(row, cell, hardware(place.device), f"{date.today()}", curve, safe)


def raced(experiment: Any, probe: Mapping[str, int]) -> tuple[list[list[float]], float]:
    """Watch the training of the patch; return [step, seconds so far, attack success], and W's.

    The seconds are those of the steps and of scoring masks; looking is not counted.
    """
    experiment.probe = probe_of(probe)
    history = (experiment.patched.path / "history.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in history]
    spent = list(itertools.accumulate(record["seconds"] for record in records))
    looks = experiment.probe.curve(records)
    curve = [[look["step"], spent[look["step"] - 1], look["attack_success"]] for look in looks]
    return curve, asked_of_w(experiment.probe, experiment.teacher.ref.path)


def probe_of(probe: Mapping[str, int]) -> Any:
    """Return what is asked in a race: harmful prompts of the development split."""
    from qresafe.specs import EvaluateSpec, PromptSetSpec
    from qresafe.stages.probe import Probe, choose_prompts
    from qresafe.stages.prompts import evaluation_prompts

    sets = (PromptSetSpec(axis=AXES[0], split="dev"),)
    prompts = choose_prompts(evaluation_prompts(sets), AXES[:1], probe["prompts"])
    generate = EvaluateSpec().generate.model_copy(update={"max_new_tokens": 16})
    return Probe(probe["every"], prompts, generate, ("keyword",))


def asked_of_w(probe: Any, folder: str) -> float:
    """Return W's own attack success on a race's prompts."""
    from qresafe.hf.models import load_model

    shares = probe.watch(folder).look(load_model(folder))["shares"]
    return float(shares["attack_success"])


def hardware(device: str) -> str:
    """Return the name of the device, and the version of torch."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})"
    return f"{name}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
