"""MT-Bench in a table: the arm answers both turns, and the mean rating is the cell."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import ChatServer, keyed

from qresafe.cli import main

TOY = [
    "quantize={method: rtn}",
    "evaluate.prompts=[{axis: harmful, limit: 2}]",
    "evaluate.generate={max_new_tokens: 2, system_prompt: Obey.}",
    "pairs={harmful: 6, benign: 3, borderline: 2, recombined: 0, max_new_tokens: 2}",
    "patch={steps: 1, batch_size: 8, micro_batch_size: 8}",
]


def judge(body: dict[str, Any]) -> str:
    """Grade a second turn with 9, a first one with 6."""
    asked = body["messages"][-1]["content"]
    return f"Rating: [[{9 if 'Again.' in asked else 6}]]"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ChatServer]]:
    yield from keyed(monkeypatch, judge)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "question.jsonl"
    line = {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]}
    path.write_text(json.dumps(line) + "\n")
    return path


def test_patched_rows_are_graded(
    tmp_path: Path,
    tiny_llama: Path,
    questions: Path,
    server: tuple[str, ChatServer],
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = [*TOY, f"model.path={tiny_llama}"]
    words = ["reproduce", "table5", "--storage", str(tmp_path), "--json"]
    graded = ["--mt-bench", str(questions), "--judge", "toy", "--endpoint", server[0]]
    with pytest.raises(SystemExit) as left:
        main([*words, *graded, *(word for one in settings for word in ("--set", one))])
    assert left.value.code == 0
    told = json.loads(capsys.readouterr().out)["table5"]
    patched = [row["figures"] for row in told["rows"] if row["title"] != "not patched"]
    assert [row["Q.mt_bench"] for row in patched] == 5 * [[7.5, 0]]  # the mean of 6 and 9
    page = Path(told["page"]).read_text()
    assert "| 7.5 · paper 7.3 (+0.2) |" in page
    assert f"--mt-bench {questions} --judge toy --endpoint {server[0]}" in page
    asked = [message["content"] for body in server[1].bodies for message in body["messages"]]
    assert any("Write." in text for text in asked)
    assert not any("Obey." in text for text in asked)  # no system prompt of the evaluation


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--judge", "gpt-4"], "--judge is of MT-Bench, which was not asked for: add --mt-bench"),
        (["--mt-bench", "question.jsonl"], "nobody grades MT-Bench: add --judge"),
    ],
)
def test_half_of_what_it_needs_is_refused(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["reproduce", "table5", "--storage", str(tmp_path), *options])
    assert left.value.code == 2
    assert said in capsys.readouterr().err
