"""MT-Bench and AlpacaEval of completions that a generate stage made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fabricated import completed, row
from servers import ChatServer, keyed
from typer.testing import CliRunner

from qresafe.artifacts import Artifact, Run
from qresafe.cli import app

QUESTIONS = {81: ("Write.", "Again."), 82: ("Tell.", "More.")}


def judge(body: dict[str, Any]) -> str:
    """Grade by how often "good" occurs, and prefer the first output of two."""
    text = body["messages"][-1]["content"]
    if "model_identifier" in text:
        return "m"
    return f"Rating: [[{1 + text.count('good')}]]"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ChatServer]]:
    yield from keyed(monkeypatch, judge)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "question.jsonl"
    lines = [
        {"question_id": number, "category": "writing", "turns": list(turns)}
        for number, turns in QUESTIONS.items()
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def turned(index: int, said: tuple[str, str], **other: Any) -> dict[str, Any]:
    first, second = list(QUESTIONS.values())[index]
    turns = {"prompt": first, "follow_ups": [second], "follow_up_answers": [said[1]]}
    return row("benign", index, said[0], **(turns | other))


def stage(folder: Path, label: str, rows: list[dict[str, Any]]) -> Artifact:
    return completed(Run(str(folder), "mine"), label, rows)


def score(*words: object) -> Any:
    return CliRunner().invoke(app, ["score", *(str(word) for word in words)])


@pytest.mark.parametrize("file", ["", "completions.parquet"])
def test_mt_bench_grades_an_arm(
    tmp_path: Path, questions: Path, server: tuple[str, ChatServer], file: str
) -> None:
    failed = turned(1, ("", ""), error="out of memory", finish="error", follow_up_answers=[])
    other = row("harmful", 0, "not one of MT-Bench's")
    made = stage(tmp_path, "Q", [turned(0, ("good", "good")), failed, other])
    common = ("--questions", questions, "--model", "toy", "--endpoint", server[0])
    where = ("--storage", tmp_path, "--json")
    found = score("mt-bench", f"Q={made.path / file}", *common, *where)
    assert found.exit_code == 0, found.output
    data = json.loads(found.stdout)
    # 1 + one "good" in the first turn, 1 + two in the second; the failed question is left out.
    assert (data["model"], data["first_turn"], data["second_turn"]) == ("Q", 2.0, 3.0)
    assert (data["decided"], data["failed_generations"]) == (2, 1)


def test_mt_bench_needs_the_second_turn(
    tmp_path: Path, questions: Path, server: tuple[str, ChatServer]
) -> None:
    alone = turned(1, ("x", ""), follow_ups=None, follow_up_answers=None)
    made = stage(tmp_path, "Q", [turned(0, ("x", "y")), alone])
    common = ("--questions", questions, "--model", "toy", "--endpoint", server[0])
    found = score("mt-bench", made.path, *common, "--storage", tmp_path)
    assert found.exit_code != 0
    assert "question 82 was asked without its second turn" in str(found.exception)


def test_alpaca_eval_compares_two_arms(tmp_path: Path, server: tuple[str, ChatServer]) -> None:
    ours = [row("benign", i, f"our {i}") for i in range(3)]
    theirs = [row("benign", i, f"their {i}") for i in range(3)]
    ours[2] |= {"completion": "", "error": "out of memory", "finish": "error"}
    q, w = stage(tmp_path, "Q", ours), stage(tmp_path, "W", theirs)
    words = [f"Q={q.path}", "--reference", f"W={w.path}", "--model", "toy", "--no-probabilities"]
    words += ["--endpoint", server[0], "--storage", str(tmp_path), "--json"]
    found = score("alpaca-eval", *words)
    assert found.exit_code == 0, found.output
    data = json.loads(found.stdout)
    assert (data["n_total"], data["failed_generations"]) == (2, 1)
    assert len(server[1].bodies) == 2  # nobody is asked about the one that failed
    rows = json.loads((Path(data["path"]) / "annotations.json").read_text())
    assert [(r["generator_1"], r["generator_2"]) for r in rows] == [("W", "Q")] * 3
    assert (rows[0]["output_1"], rows[0]["output_2"]) == ("their 0", "our 0")
    assert rows[2]["preference"] is None
    assert rows[2]["error"] == "generation failed: out of memory"
