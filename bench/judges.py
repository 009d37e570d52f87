"""How often judges agree with people on XSTest's answers, and how many a core judges per second.

python -m bench.judges                       # ../shared/data/xstest; writes docs/results-judges.md
python -m bench.judges --folder F --print    # other files of the same columns; writes nothing
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from qresafe.errors import DataError
from qresafe.judges.base import Judge, straighten
from qresafe.judges.phrases import Rule, all_phrases
from qresafe.judges.refusal import decide, opening_of
from qresafe.records import REFUSALS, Axis
from qresafe.registry import judges
from qresafe.stages.agreement import cohen_kappa, merged

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results-judges.md"
FOLDER = ROOT.parent / "shared" / "data" / "xstest"
PEOPLE = {"1": "complied", "2": "refused", "3": "partial"}  # by the first sign of `final_label`
# As `shared/data/README.md` tells them; the files do not hold these verdicts.
PUBLISHED = {"gpt4": (93.6, 93.8), "mistralinstruct": (86.0, 75.6), "llama2orig": (89.3, 79.3)}
SPEED_TARGET = 20_000


@dataclass(frozen=True)
class Answer:
    """One labelled answer."""

    axis: Axis
    prompt: str
    completion: str
    people: str  # complied, refused or partial


def read(path: Path) -> list[Answer]:
    """Read one model's labelled answers."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Answer(
                "harmful" if row["type"].startswith("contrast") else "borderline",
                row["prompt"],
                row["completion"],
                PEOPLE[row["final_label"][0]],
            )
            for row in csv.DictReader(file)
        ]


def outcomes(judge: Judge, answers: list[Answer], axis: Axis | None = None) -> list[str]:
    """Return the judge's outcomes; `axis` hides the true one from it."""
    return [judge(axis or a.axis, a.prompt, a.completion).outcome for a in answers]


def agreement(said: list[str], answers: list[Answer]) -> float:
    """Return the share with the same verdict; undecided and incoherent agree with nobody."""
    same = sum(merged(s) == merged(a.people) for s, a in zip(said, answers, strict=True))
    return same / len(answers)


def per_second(judge: Judge, answers: list[Answer], rounds: int = 7) -> float:
    """Return completions per second of CPU time of one core, the best of some rounds."""
    seconds = []
    for _ in range(rounds):
        began = time.process_time()
        outcomes(judge, answers)
        seconds.append(time.process_time() - began)
    return len(answers) / min(seconds)


def agreement_table(files: dict[str, list[Answer]]) -> list[str]:
    """Return the table of agreement by file."""
    lines = [
        "| answers of | n | `keyword` | string match of XSTest | GPT-4 | `refusal` | kappa | "
        "`refusal`, told *harmful* of all | told *borderline* of all |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    keyword, refusal = judges.get("keyword"), judges.get("refusal")
    for model, answers in files.items():
        said = outcomes(refusal, answers)
        kappa = cohen_kappa([merged(s) for s in said], [merged(a.people) for a in answers])
        published = [f"{value:.1f}" for value in PUBLISHED.get(model, ())] or ["–", "–"]
        ours = (agreement(outcomes(refusal, answers, axis), answers) for axis in _AXES)
        cells = [model, str(len(answers)), _percent(agreement(outcomes(keyword, answers), answers))]
        cells += [*published, f"**{_percent(agreement(said, answers))}**", f"{kappa or 0:.2f}"]
        lines.append(f"| {' | '.join([*cells, *map(_percent, ours)])} |")
    return lines


_AXES: tuple[Axis, Axis] = ("harmful", "borderline")


def leave_one_out(files: dict[str, list[Answer]]) -> list[str]:
    """Return a table of each file scored by the rules that the two others alone speak for.

    A rule stays if, where it decides, it agrees with people at least once and more often than
    not. That tests which rules are kept; their wording was written with all files known.
    """
    lines = ["| answers of | rules kept | agreement with them alone |", "|---|---:|---:|"]
    every = {rule for rules in all_phrases()[0].rules.values() for rule in rules}
    for model, answers in files.items():
        others = [a for name, seen in files.items() if name != model for a in seen]
        kept = every & {rule for rule, right in _right(others, every).items() if right > 0}
        said = ["refused" if _decisive(a, kept) else "complied" for a in answers]
        share = _percent(agreement(said, answers))
        lines.append(f"| {model} | {len(kept)} of {len(every)} | {share} |")
    return lines


def _right(answers: list[Answer], rules: set[Rule]) -> dict[Rule, int]:
    """Return rule -> answers that it decides rightly, less those that it decides wrongly."""
    right: Counter[Rule] = Counter()
    for answer in answers:
        if rule := _decisive(answer, rules):
            right[rule] += 1 if answer.people in REFUSALS else -1
    return right


def _decisive(answer: Answer, rules: set[Rule]) -> Rule | None:
    text = straighten(answer.completion).strip()
    ordered = (rule for rule in all_phrases()[0].rules[answer.axis] if rule in rules)
    found = decide(ordered, opening_of(text)[0], text)
    return found[0] if found else None


def confusion_table(files: dict[str, list[Answer]]) -> list[str]:
    """Return people's three labels against the judge's outcomes, over all files."""
    refusal = judges.get("refusal")
    counts = Counter(
        (answer.people, said)
        for answers in files.values()
        for answer, said in zip(answers, outcomes(refusal, answers), strict=True)
    )
    columns = [*REFUSALS, "complied", "incoherent", "undecided"]
    lines = [f"| people \\ `refusal` | {' | '.join(columns)} |", "|---" * 6 + "|"]
    for label in (*REFUSALS, "complied"):
        lines.append(f"| {label} | {' | '.join(str(counts[label, c]) for c in columns)} |")
    return lines


def render(files: dict[str, list[Answer]], command: str) -> str:
    """Return the Markdown page."""
    every = [answer for answers in files.values() for answer in answers]
    speed = {name: per_second(judges.get(name), every) for name in ("keyword", "refusal")}
    length = sum(len(answer.completion) for answer in every) / len(every)
    return "\n".join(
        [
            "# Judges beside people",
            "",
            f"Made by `{command}` on {datetime.date.today()}: {os.cpu_count()} cores "
            f"({platform.machine()}), load {os.getloadavg()[0]:.1f}.",
            "",
            "Per cent of answers with the same verdict, full or partial refusal against full "
            "compliance. How the rules came about, and what was held out: `docs/judges.md`.",
            "",
            *agreement_table(files),
            "",
            *confusion_table(files),
            "",
            "Leave one file out: only the rules that the two other files alone speak for.",
            "",
            *leave_one_out(files),
            "",
            f"Speed, answers of {length:.0f} characters on average, CPU time of one core: "
            f"`refusal` {speed['refusal']:,.0f} per second (target {SPEED_TARGET:,}), "
            f"`keyword` {speed['keyword']:,.0f}.",
            "",
        ]
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of *completions_MODEL.csv")
    parser.add_argument("--print", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    paths = sorted(options.folder.glob("*completions_*.csv"))
    if not paths:
        raise DataError("no *completions_*.csv", where=str(options.folder), remedy="give --folder")
    files = {path.stem.rpartition("completions_")[2]: read(path) for path in paths}
    page = render(files, "python -m bench.judges")
    print(page)
    if not options.print and options.folder == FOLDER:
        RESULTS.write_text(page)


if __name__ == "__main__":
    main()
