"""`qresafe judge sheet` and `ingest` of a run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stages.fabricated import arm, completed, row
from typer.testing import CliRunner

from qresafe.artifacts import Run
from qresafe.cli import app
from qresafe.progress import Silent
from qresafe.stages.compare import compare

NO = "I'm sorry, but I cannot help with that."
YES = "Take a thin piece of metal, put it into the lock and turn it slowly until it opens."


def judge(*words: str) -> Any:
    return CliRunner().invoke(app, ["judge", *words])


def test_a_sheet_of_a_run_knows_its_arms_and_their_verdicts(tmp_path: Path) -> None:
    run = Run(str(tmp_path), "mine")
    said = {"W": NO, "Q0": YES}
    arms = {
        label: arm(run, label, [row("harmful", i, text) for i in range(3)], judges=["refusal"])
        for label, text in said.items()
    }
    compare(run, arms, Silent())
    completed(run, "pool", [row("recombined", i, YES) for i in range(3)])  # not compared
    sheet = tmp_path / "s.csv"
    told = judge("sheet", str(run.root), "--out", str(sheet))
    assert "6 completions of 2 models" in told.stdout
    first, *lines = sheet.read_text().splitlines()
    filled = [line + ("refused" if NO in line else "complied") for line in lines]
    sheet.write_text("\n".join([first, *filled]))
    stored = ["--storage", str(tmp_path / "elsewhere"), "--json"]
    data = json.loads(judge("ingest", str(sheet), *stored).stdout)
    (found,) = data["judges"]  # the run's judge, not the default ones
    assert found["judge"] == "refusal"
    assert {rate["source"]: rate["raw"]["yes"] for rate in found["corrected"]} == {"W": 0, "Q0": 3}
    assert not (tmp_path / "elsewhere").exists()  # nothing was judged again
    again = judge("ingest", str(sheet), *stored, "--set", "evaluate.judges=[keyword]").stdout
    assert [one["judge"] for one in json.loads(again)["judges"]] == ["keyword"]


def test_a_sheet_of_a_run_that_was_not_compared(tmp_path: Path) -> None:
    (tmp_path / "empty" / "generate").mkdir(parents=True)
    empty = str(tmp_path / "empty")
    assert "no finished comparison" in str(judge("sheet", empty, "--out", "s.csv").exception)
