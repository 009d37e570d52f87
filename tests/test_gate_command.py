"""`qresafe gate` as a pipeline sees it: exit codes, JSON on stdout, JUnit in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from qresafe.cli import main

NO, YES = "I'm sorry, but I can't help with that.", "Step one: take it. Step two: use it well."
DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Run `qresafe gate` with its storage in a temporary folder; return (code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as leaving:
            main(["gate", *arguments, "--storage", str(tmp_path / "store")])
        return leaving.value.code, *capsys.readouterr()

    return run


def answered(path: Path, n: int, yes: int, **more: Any) -> str:
    rows = [
        {"prompt": f"request {i}", "completion": YES if i < yes else NO, **more} for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("n", "before", "after", "code"), [(600, 3, 3, 0), (600, 3, 90, 3), (30, 1, 1, 5)]
)
def test_the_exit_code_is_the_verdict(
    cli: Any, tmp_path: Path, n: int, before: int, after: int, code: int
) -> None:
    files = [
        "--baseline",
        answered(tmp_path / "a.jsonl", n, before),
        "--candidate",
        answered(tmp_path / "b.jsonl", n, after),
    ]
    found, out, err = cli(*files, "--json", "--junit", str(tmp_path / "ci" / "gate.xml"))
    assert found == code, err
    result = json.loads(out)
    assert result["exit_code"] == code
    assert result["checks"][0]["n"] == n
    assert result["checks"][1]["verdict"] == "skipped"
    suite = ElementTree.parse(tmp_path / "ci" / "gate.xml").getroot()[0]
    assert suite.get("failures") == str(int(code == 3))
    assert int(suite.get("errors") or 0) == 2 * (code == 5)  # compliance and coherence


def test_a_threshold_that_is_given_must_be_measured(cli: Any, tmp_path: Path) -> None:
    path = answered(tmp_path / "a.jsonl", 600, 3)
    code, out, _ = cli("--baseline", path, "--candidate", path, "--max-over-refusal-increase", "3")
    assert code == 4
    assert "unmeasured (exit code 4)" in out
    assert "no prompts of this axis" in out


def test_the_table_says_what_would_resolve_it(cli: Any, tmp_path: Path) -> None:
    path = answered(tmp_path / "a.jsonl", 30, 1)
    code, out, _ = cli("--baseline", path, "--candidate", path)
    assert code == 5
    assert "about 189 prompts would resolve it, there are 30" in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "there is nothing to compare"),
        (["--baseline", "a.jsonl"], "there is nothing to compare"),
        (["--baseline-model", "x"], "only one model"),
        (["--baseline-model", "x", "--baseline", "y"], "both given"),
        (["--prompts", "p.jsonl"], "--prompts needs models"),
        (["demo"], "no such run"),
        (["dem0"], "dem0"),
        (["--baseline", "no.jsonl", "--candidate", "no.jsonl"], "no completions in no.jsonl"),
    ],
)
def test_a_mistake_is_one_sentence_and_code_2(cli: Any, arguments: list[str], told: str) -> None:
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert err.strip().splitlines()[-1].startswith("error: ")
    assert told in err
    assert "Traceback" not in err


def test_different_prompts_are_refused(cli: Any, tmp_path: Path) -> None:
    first = answered(tmp_path / "a.jsonl", 20, 1)
    second = answered(tmp_path / "b.jsonl", 21, 1)
    code, _, err = cli("--baseline", first, "--candidate", second)
    assert code == 2
    assert "measured with different prompts" in err


def test_two_models_answer_the_same_prompts(cli: Any, tmp_path: Path, tiny_llama: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    asked = [{"prompt": f"do {i}", "axis": "borderline" if i else "harmful"} for i in range(3)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in asked))
    models = ["--baseline-model", str(tiny_llama), "--candidate-model", str(tiny_llama)]
    more = ["--prompts", str(prompts), "--set", "evaluate.generate.max_new_tokens=4", "--json"]
    code, out, err = cli(*models, *more)
    assert code in (4, 5), err  # a random model says nothing that a judge could decide on
    assert [check["axis"] for check in json.loads(out)["checks"]] == [
        "attack_success",
        "over_refusal",
        "utility",
    ]
    _, again, err = cli(*models, *more)
    assert again == out
    assert "reused" in err
    prompts.write_text('{"prompt": "p", "axis": "harmles"}\n')
    code, _, err = cli(*models, "--prompts", str(prompts))
    assert code == 2
    assert "axis 'harmles'" in err


def test_the_example_for_github_is_a_workflow() -> None:
    text = (DOCS / "gate.md").read_text()
    flow = yaml.safe_load(text.split("```yaml")[1].split("```")[0])
    steps = flow["jobs"]["gate"]["steps"]
    command = next(step["run"] for step in steps if step.get("name") == "Gate")
    assert "qresafe gate --baseline completions/baseline" in " ".join(command.split())
