"""How often any judge agrees with people on XSTest's labelled completions, per model that answered.

python -m bench.judge_models --judge refusal
python -m bench.judge_models --judge '{judge: llm, rubric: refusal, model: gpt-4o}'
python -m bench.judge_models --judge '{judge: classifier, template: wildguard, path: DIR}'
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
from upath import UPath

from qresafe.artifacts import Artifact, Run, content_key
from qresafe.console import progress_on, table
from qresafe.dist.runtime import make_runtime
from qresafe.judge_specs import JudgeSpec
from qresafe.loading import load_spec, read_yaml
from qresafe.records import COMPLETION
from qresafe.specs import EvaluateSpec, ResourcesSpec
from qresafe.stages.judge import FILE, check_judges, judge
from qresafe.stages.runtime import Row, read_table, write_table
from qresafe.stages.statistics import wilson

MODELS = ("gpt4", "mistralinstruct", "llama2orig")
COMPLIED = "1_full_compliance"  # other labels are full and partial refusals


def labelled(folder: Path, model: str) -> list[Row]:
    """Return the completions of one model, with what people say: refused or complied."""
    with (folder / f"xstest_v2_completions_{model}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        {
            "prompt_id": f"{model}-{row['id']}",
            # Contrasts are the prompts that a model should refuse.
            "axis": "harmful" if row["type"].startswith("contrast") else "borderline",
            "prompt": row["prompt"],
            "completion": row["completion"],
            "people": "complied" if row["final_label"] == COMPLIED else "refused",
        }
        for row in rows
    ]


def stored(run: Run, model: str, rows: Sequence[Row]) -> Artifact:
    """Return completions as if a `generate` stage had made them."""
    blank: Row = dict.fromkeys(COMPLETION.names)
    blank |= {"sample": 0, "completion_ids": [], "prompt_tokens": 0, "new_tokens": 0}
    whole = [blank | {"finish": "stop"} | row for row in rows]
    for row in whole:
        row.pop("people")

    def work(folder: UPath) -> dict[str, Any]:
        write_table(folder / "completions.parquet", pa.Table.from_pylist(whole, schema=COMPLETION))
        return {"rows": len(whole)}

    key = {"rows": content_key([list(row.values()) for row in rows])}
    return run.stage("import", spec={"model": model}, inputs=key, code_version=1, work=work)


def agreement(rows: Sequence[Row], verdicts: Sequence[Row]) -> list[str]:
    """Return a line of the table: agreement, its 95 % interval, and what was not decided."""
    said = [verdict["outcome"] for verdict in verdicts]
    agree = sum(row["people"] == outcome for row, outcome in zip(rows, said, strict=True))
    low, high = wilson(agree, len(rows))
    silent = sum(outcome not in ("refused", "complied") for outcome in said)
    share = f"{100 * agree / len(rows):.1f} %"
    return [str(len(rows)), share, f"{100 * low:.1f}-{100 * high:.1f}", str(silent)]


def main() -> None:
    """Judge the three files and print the table; what is undecided counts as disagreement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--judge", required=True, help="a name, or a spec as YAML")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/xstest"))
    parser.add_argument("--storage", default=".", help="where runs/judge-models/ lies")
    parser.add_argument("--workers", type=int, default=0, help="Ray workers; 0: this process")
    parser.add_argument("--gpus", type=float, default=0.0, help="GPUs for each worker")
    given = parser.parse_args()
    chosen = load_spec(EvaluateSpec, {"judges": [read_yaml(given.judge)]}).judges
    check_judges(chosen)
    resources = ResourcesSpec(workers=given.workers, gpus_per_worker=given.gpus)
    run, lines = Run(given.storage, "judge-models"), []
    with progress_on() as progress, closing(make_runtime(resources)) as runtime:
        for model in MODELS:
            rows = labelled(given.data, model)
            made = judge(run, stored(run, model, rows), chosen, progress, model, runtime)
            lines.append([model, *agreement(rows, read_verdicts(made, chosen))])
    table(["answers of", "n", "agreement", "95 %", "not decided"], lines)


def read_verdicts(made: Artifact, chosen: Sequence[JudgeSpec]) -> list[Row]:
    """Return the verdicts of the one judge, in the completions' order."""
    assert len(chosen) == 1
    verdicts: list[Row] = read_table(made.path / FILE).to_pylist()
    return verdicts


if __name__ == "__main__":
    main()
