"""MT-Bench and AlpacaEval against a server on loopback, and their command line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import ChatServer, keyed
from typer.testing import CliRunner

from qresafe.artifacts import Run
from qresafe.cli import app
from qresafe.errors import DataError
from qresafe.judge_specs import EndpointSpec
from qresafe.judges import alpaca as rules
from qresafe.progress import Silent
from qresafe.stages import alpaca, mt_bench
from qresafe.stages.runtime import InProcessRuntime

SHARED = Path(__file__).parents[3] / "shared/data/mt_bench"


def better(body: dict[str, Any]) -> str:
    """Grade by how often "good" occurs; compare by it; a judge that likes the first place."""
    text = body["messages"][-1]["content"]
    if "BAD JUDGE" in text:
        return "I cannot say."
    if "Assistant B" not in text:
        return f"Rating: [[{min(10, 1 + text.count('good'))}]]"
    first, second = text.split("Assistant B", 1)
    if text.count("good") == 0:
        return "[[A]]"
    return "[[A]]" if first.count("good") > second.count("good") else "[[B]]"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ChatServer]]:
    yield from keyed(monkeypatch, better)


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(path: Path, texts: dict[int, tuple[str, str]]) -> Path:
    return jsonl(
        path,
        [
            {"question_id": number, "model_id": path.stem, "choices": [{"turns": list(turns)}]}
            for number, turns in texts.items()
        ],
    )


@pytest.fixture
def bench(tmp_path: Path) -> dict[str, Path]:
    questions = [
        {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
        {"question_id": 111, "category": "math", "turns": ["1+1?", "2+2?"]},
    ]
    return {
        "questions": jsonl(tmp_path / "question.jsonl", questions),
        "references": answers(tmp_path / "gpt-4.jsonl", {111: ("2", "4")}),
        "ours": answers(tmp_path / "ours.jsonl", {81: ("good", "good"), 111: ("2", "BAD JUDGE")}),
        "theirs": answers(tmp_path / "theirs.jsonl", {81: ("x", "y"), 111: ("2", "4")}),
    }


def spec(url: str, **changes: Any) -> EndpointSpec:
    given = {"endpoint": url, "model": "toy", "timeout_seconds": 2, "retries": 1}
    return EndpointSpec.model_validate(given | changes)


def judged(folder: Path, bench: dict[str, Path], url: str, against: bool = False) -> Any:
    return mt_bench.mt_bench(
        Run(str(folder), "mt"),
        mt_bench.read_questions(bench["questions"], bench["references"]),
        mt_bench.read_answers(bench["ours"]),
        mt_bench.read_answers(bench["theirs"]) if against else None,
        spec(url),
        InProcessRuntime(),
        Silent(),
    )


def test_single_grading(
    tmp_path: Path, bench: dict[str, Path], server: tuple[str, ChatServer]
) -> None:
    url, _ = server
    made = judged(tmp_path, bench, url)
    result = json.loads((made.path / mt_bench.RESULT).read_text())
    lines = [json.loads(line) for line in (made.path / mt_bench.FILE).read_text().splitlines()]
    assert [(line["question_id"], line["turn"], line["score"]) for line in lines] == [
        (81, 1, 2.0),  # one "good"
        (81, 2, 3.0),  # both turns are shown
        (111, 1, 1.0),
        (111, 2, -1),  # the judge's answer is malformed
    ]
    assert lines[2]["judge"] == ["toy", "single-math-v1"]
    assert "[The Start of Reference Answer]\n2\n" in lines[2]["user_prompt"]
    assert (result["first_turn"], result["second_turn"], result["average"]) == (1.5, 3.0, 2.0)
    assert (result["decided"], result["undecided"]) == (3, 1)
    assert judged(tmp_path, bench, url).reused


def test_pairs_are_judged_in_both_orders(
    tmp_path: Path, bench: dict[str, Path], server: tuple[str, ChatServer]
) -> None:
    url, state = server
    made = judged(tmp_path, bench, url, against=True)
    result = json.loads((made.path / mt_bench.RESULT).read_text())
    lines = [json.loads(line) for line in (made.path / mt_bench.FILE).read_text().splitlines()]
    assert len(state.bodies) == 8  # 2 questions, 2 turns, 2 orders
    assert [(line["g1_winner"], line["g2_winner"]) for line in lines] == [
        ("model_1", "model_1"),
        ("model_1", "model_1"),
        ("model_1", "model_2"),  # no "good" anywhere: whoever is shown first
        ("error", "error"),
    ]
    assert (result["win"], result["loss"], result["tie"], result["undecided"]) == (2, 0, 1, 1)
    assert result["win_rate_adjusted"] == 2.5 / 3


def test_the_command_grades(
    tmp_path: Path, bench: dict[str, Path], server: tuple[str, ChatServer]
) -> None:
    url, _ = server
    words = ["score", "mt-bench", bench["ours"], "--questions", bench["questions"]]
    words += ["--references", bench["references"], "--model", "toy", "--endpoint", url]
    words += ["--storage", tmp_path, "--set", "price_per_million_prompt=1", "--json"]
    found = CliRunner().invoke(app, [str(word) for word in words])
    assert found.exit_code == 0, found.output
    data = json.loads(found.stdout)
    assert data["average"] == 2.0
    assert data["usage"]["cost"] == pytest.approx(4 * 30 / 1e6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question_id": 1, "category": "writing", "turns": ["a"]}', "not a question of MT-Bench"),
        ('{"question_id": 1, "category": "math", "turns": ["a", "b"]}', "has no reference"),
        ('{"question_id": 1, "cat', "malformed JSON"),
        ("", "no question"),
    ],
)
def test_malformed_questions(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "q.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        mt_bench.read_questions(tmp_path / "q.jsonl", None)


def test_a_question_without_an_answer(
    tmp_path: Path, bench: dict[str, Path], server: tuple[str, ChatServer]
) -> None:
    bench["ours"] = answers(tmp_path / "few.jsonl", {81: ("a", "b")})
    with pytest.raises(DataError, match="1 questions are not answered, 111 first in few"):
        judged(tmp_path, bench, server[0])


@pytest.mark.data
@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data/mt_bench")
def test_the_real_questions_and_references_are_read() -> None:
    questions = mt_bench.read_questions(SHARED / "question.jsonl", SHARED / "gpt-4.jsonl")
    assert len(questions) == 80
    assert sum(question.reference is not None for question in questions) == 30


# ---------------------------------------------------------------- AlpacaEval


def outputs(path: Path, texts: list[str]) -> Path:
    rows = [
        {"instruction": f"instruction {n}", "output": text, "generator": path.stem}
        for n, text in enumerate(texts)
    ]
    path.write_text(json.dumps(rows))
    return path


def likes_better(body: dict[str, Any]) -> str:
    """Answer with log-probabilities: 0.8 for the output that says "better", 0.5 for neither."""
    text = body["messages"][-1]["content"]
    second = text.split('"model_identifier": "M"')[1]
    share = 0.5 if "better" not in text else 0.8 if "better" in second else 0.2
    tops = {} if "MALFORMED" in text else {"m": math.log(1 - share), "M": math.log(share)}
    return json.dumps(tops | {"The": math.log(0.01)})


def test_annotations_and_their_win_rate(tmp_path: Path, server: tuple[str, ChatServer]) -> None:
    url, state = server
    state.answer = likes_better
    ours = outputs(tmp_path / "ours.json", ["better", "x", "x", "MALFORMED", "CUT"] + ["x"] * 5)
    base = outputs(tmp_path / "base.json", ["x", "better", "x", "x", "x"] + ["x"] * 5)
    made = alpaca.annotate(
        Run(str(tmp_path), "a"),
        alpaca.read_outputs(ours),
        alpaca.read_outputs(base),
        spec(url, max_new_tokens=1),
        InProcessRuntime(),
        Silent(),
    )
    rows = alpaca.read_annotations(made.path / alpaca.FILE)
    preferences = [row["preference"] for row in rows]
    # Whatever place the outputs were shown in: 1 + 0.8, 1 + 0.2, and draws.
    assert preferences[:3] == pytest.approx([1.8, 1.2, 1.5])
    assert preferences[3:5] == [None, None]
    assert "malformed" in rows[4]["error"]
    assert rows[0]["generator_1"] == "base"
    assert alpaca.summarize(rows, None)["win_rate"] == pytest.approx(50.0)
    assert {rules.is_swapped(f"instruction {n}") for n in range(10)} == {True, False}
    assert state.bodies[0]["top_logprobs"] == 5


def test_the_command_reads_published_annotations(tmp_path: Path) -> None:
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps([{"preference": p} for p in (1, 2, 2, 1.5, None, 0)]))
    found = CliRunner().invoke(app, ["score", "alpaca-eval", str(file), "--json"])
    assert found.exit_code == 0, found.output
    # (0 + 1 + 1 + 0.5 + 0.5) / 5
    assert json.loads(found.stdout)["win_rate"] == pytest.approx(60.0)


def test_the_command_controls_for_length(tmp_path: Path) -> None:
    table = ["model,index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline"]
    table += [
        f"g,{n % 20},{0.4 + n % 3 / 10},{n % 7 - 3},{n % 20 / 10 - 1},False" for n in range(40)
    ]
    (tmp_path / "gamed.csv").write_text("\n".join(table) + "\n")
    rows = [
        {"preference": 1 + n % 4 / 4, "output_1": "x" * 10, "output_2": "y" * (n + 5)}
        for n in range(20)
    ]
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(rows))
    words = ["score", "alpaca-eval", str(file), "--gamed", str(tmp_path / "gamed.csv"), "--json"]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    data = json.loads(found.stdout)
    assert 0 < data["length_controlled_winrate"] < 100
    assert set(data["weights"]) == {"length", "difficulty", "model"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "malformed JSON"),
        ("{}", "no list of entries"),
        ("[]", "no list of entries"),
        ('[{"output_1": "x"}]', "no preference in .*entry 0"),
        ('[{"preference": "high"}]', "preference 'high' is no number"),
    ],
)
def test_malformed_annotations(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=message):
        alpaca.read_annotations(tmp_path / "a.json")


def test_an_instruction_without_an_output(tmp_path: Path) -> None:
    ours = alpaca.read_outputs(outputs(tmp_path / "o.json", ["x"]))
    base = alpaca.read_outputs(outputs(tmp_path / "b.json", ["x", "y"]))
    with pytest.raises(DataError, match="no output for instruction 1, 'instruction 1'"):
        alpaca.annotate(
            Run(str(tmp_path), "a"), ours, base, spec("http://x/v1"), InProcessRuntime(), Silent()
        )


def test_a_judge_must_be_named(tmp_path: Path, bench: dict[str, Path]) -> None:
    words = ["score", "mt-bench", bench["ours"], "--questions", bench["questions"]]
    words += ["--references", bench["references"]]
    found = CliRunner().invoke(app, [str(word) for word in words])
    assert found.exit_code != 0
    assert "no judge is named" in str(found.exception)
