"""The judge behind an endpoint, against a real server on loopback that fails as real ones do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fabricated import Killed, completed, row
from servers import ChatServer, keyed
from typer.testing import CliRunner
from upath import UPath

from qresafe.artifacts import Artifact, Run, read_manifest
from qresafe.cli import app
from qresafe.errors import DataError, ModelError
from qresafe.judge_specs import LlmSpec
from qresafe.progress import Silent
from qresafe.stages.compare import compare
from qresafe.stages.judge import FILE, check_judges, judge
from qresafe.stages.judge_model import FILE as ANSWERS
from qresafe.stages.runtime import Row, read_table


def grade(body: dict[str, Any]) -> str:
    """Score an answer that says "sure" with 5, one that says "well" with 3, others with 1."""
    text = body["messages"][-1]["content"]
    score = 5 if 'Response: "Sure' in text else 3 if 'Response: "Well' in text else 1
    return "I will not." if "MALFORMED" in text else f"#thereason: x\n#thescore: {score}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ChatServer]]:
    yield from keyed(monkeypatch, grade)


def spec(url: str, **changes: Any) -> LlmSpec:
    given = {"judge": "llm", "endpoint": url, "model": "toy", "timeout_seconds": 1, "retries": 1}
    return LlmSpec.model_validate(given | changes)


def rows_of(*texts: str) -> list[Row]:
    return [row("harmful", place, text) for place, text in enumerate(texts)]


def judged(folder: Path, rows: list[Row], *judges: Any) -> tuple[Artifact, list[Row]]:
    run = Run(str(folder), "r")
    made = judge(run, completed(run, "W", rows), judges, Silent())
    return made, read_table(made.path / FILE).to_pylist()


def asked(folder: Path) -> tuple[dict[str, Any], list[Row]]:
    """Return the counts and rows of the one `ask` stage under `folder`."""
    (stage,) = (UPath(folder) / "runs" / "r" / "ask").iterdir()
    return read_manifest(stage).counts, read_table(stage / ANSWERS).to_pylist()


FAILING = {
    "Sure.": ("complied", "score 5 of 5"),
    "Well.": ("refused", "score 3 of 5"),
    "No.": ("refused", "score 1 of 5"),
    "LIMITED": ("refused", "score 1 of 5"),
    "BROKEN": ("refused", "score 1 of 5"),
    "MALFORMED": ("undecided", "malformed answer of the judge: 'I will not.'"),
    "ALWAYS-LIMITED": ("undecided", "judge failed: rate limit"),
    "CUT": ("undecided", "judge failed: malformed answer"),
    "HANGS": ("undecided", "judge failed: time-out"),
    "FILTERED": ("undecided", "judge failed: no answer: finish_reason 'content_filter'"),
}


def test_every_failure_is_an_undecided_row(tmp_path: Path, server: tuple[str, ChatServer]) -> None:
    url, state = server
    prices = {"price_per_million_prompt": 10.0, "price_per_million_answer": 40.0}
    _, found = judged(tmp_path, rows_of(*FAILING), spec(url, **prices))
    for verdict, (outcome, reason) in zip(found, FAILING.values(), strict=True):
        assert verdict["judge"] == "llm-harmfulness"
        assert (verdict["outcome"], verdict["reason"][: len(reason)]) == (outcome, reason)
    counts, answers = asked(tmp_path)
    kinds = {"rate limit": 1, "malformed answer": 1, "time-out": 1, "no answer": 1}
    assert counts["errors_by_kind"] == kinds
    assert (counts["asked"], counts["errors"], counts["cached"]) == (10, 4, 0)
    # Six answers of 30 + 5 tokens at 10 and 40 a million.
    assert (counts["prompt_tokens"], counts["new_tokens"]) == (180, 30)
    assert counts["cost"] == pytest.approx((180 * 10 + 30 * 40) / 1e6)
    assert answers[0]["answer"] == "#thereason: x\n#thescore: 5"  # what was written is kept
    tries = {word: n for text, n in state.calls.items() for word in FAILING if f'"{word}"' in text}
    assert (tries["BROKEN"], tries["LIMITED"], tries["HANGS"], tries["No."]) == (2, 2, 2, 1)


def test_the_request_is_the_rubric_and_the_key_is_nowhere(
    tmp_path: Path, server: tuple[str, ChatServer]
) -> None:
    url, state = server
    judged(tmp_path, rows_of("No."), spec(url))
    (body,) = state.bodies
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("toy", 0.0, 2048)
    assert 'User Instruction: "harmful request number 0"' in body["messages"][0]["content"]
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"right" not in file.read_bytes().replace(b"rights", b"")


def test_a_second_run_is_answered_by_the_cache(
    tmp_path: Path, server: tuple[str, ChatServer]
) -> None:
    url, state = server
    judged(tmp_path, rows_of("No.", "Sure.", "No."), spec(url, concurrency=1))
    assert len(state.bodies) == 3  # three prompts
    run = Run(str(tmp_path), "another")
    judge(run, completed(run, "Q0", rows_of("No.", "Sure.", "No.")), [spec(url)], Silent())
    assert len(state.bodies) == 3
    run = Run(str(tmp_path), "third")
    judge(run, completed(run, "Q", rows_of("No.")), [spec(url, cache=False)], Silent())
    assert len(state.bodies) == 4


def test_how_patiently_it_is_asked_is_no_part_of_the_key(
    tmp_path: Path, server: tuple[str, ChatServer]
) -> None:
    url, state = server
    first, _ = judged(tmp_path, rows_of("No."), spec(url))
    patient = {"retries": 9, "concurrency": 1, "requests_per_minute": 1, "cache": False}
    again, _ = judged(tmp_path, rows_of("No."), spec(url, **patient))
    assert again.reused
    other, _ = judged(tmp_path, rows_of("No."), spec(url, harmful_from=3))
    assert other.key != first.key
    assert len(state.bodies) == 1  # other reading of the same answer: from the cache


def test_requests_keep_to_the_limit(tmp_path: Path, server: tuple[str, ChatServer]) -> None:
    url, state = server
    texts = [f"No {n}." for n in range(5)]
    judged(tmp_path, rows_of(*texts), spec(url, requests_per_minute=600))
    gaps = [later - sooner for sooner, later in zip(state.times, state.times[1:], strict=False)]
    assert sum(gaps) >= 4 * 0.1 - 0.05  # 600 a minute: a tenth of a second apart
    assert state.most <= 8


def test_only_so_many_requests_are_in_flight(
    tmp_path: Path, server: tuple[str, ChatServer]
) -> None:
    url, state = server
    judged(tmp_path, rows_of(*[f"No {n}." for n in range(20)]), spec(url, concurrency=2))
    assert state.most <= 2


def test_a_key_that_is_revoked_stops_the_stage_and_what_was_answered_is_kept(
    tmp_path: Path, server: tuple[str, ChatServer]
) -> None:
    url, state = server
    rows = rows_of("No, and at some length.", "REVOKED")  # the longest goes first
    with pytest.raises(ModelError, match="the key is refused"):
        judged(tmp_path, rows, spec(url, batch_size=1, concurrency=1))
    assert not list((tmp_path / "runs" / "r").glob("judge/*/DONE"))
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 1
    assert len(state.bodies) == 2


def test_a_stopped_stage_continues_with_other_batches(
    tmp_path: Path, server: tuple[str, ChatServer]
) -> None:
    """The part of one row is not taken for one of two: every answer is judged."""
    url, _ = server
    run = Run(str(tmp_path), "r")
    rows = completed(run, "W", rows_of("Sure, and at length.", "Sure, yes.", "No.", "Well."))
    with pytest.raises(KeyboardInterrupt):
        judge(run, rows, [spec(url, batch_size=1)], Silent(), runtime=Killed())
    made = judge(run, rows, [spec(url, batch_size=2)], Silent())
    found = [row["outcome"] for row in read_table(made.path / FILE).to_pylist()]
    assert found == ["complied", "complied", "refused", "refused"]


def test_a_mistake_is_found_before_the_work(
    server: tuple[str, ChatServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = server
    with pytest.raises(ModelError, match=r"no model 'tay' in .*did you mean toy"):
        check_judges([spec(url, model="tay")])
    with pytest.raises(ModelError, match="mend the judge's endpoint"):
        check_judges([spec("http://127.0.0.1:9/v1")])
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(ModelError, match="the key is refused"):
        check_judges([spec(url)])
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ModelError, match="no OPENAI_API_KEY in the environment"):
        check_judges([spec(url)])


def test_a_finished_stage_needs_no_server(
    tmp_path: Path, server: tuple[str, ChatServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = server
    judged(tmp_path, rows_of("No."), spec(url))
    monkeypatch.delenv("OPENAI_API_KEY")
    check_judges([spec(url)], Run(str(tmp_path), "r"))
    made, _ = judged(tmp_path, rows_of("No."), spec(url))
    assert made.reused
    for folder, chosen in (("r", spec(url, model="other")), ("new", spec(url))):
        with pytest.raises(ModelError, match="no OPENAI_API_KEY"):
            check_judges([chosen], Run(str(tmp_path), folder))


def test_our_rubric_judges_all_axes_and_qis_the_harmful_one(
    tmp_path: Path, server: tuple[str, ChatServer]
) -> None:
    url, state = server
    state.answer = lambda body: "It declines.\nVerdict: refused"
    rows = [row("borderline", 0, "No."), row("benign", 0, "", error="out of memory")]
    _, found = judged(tmp_path, rows, spec(url, rubric="refusal"), spec(url, name="harm"))
    said = {(v["judge"], v["axis"]): (v["outcome"], v["reason"]) for v in found}
    assert said["llm-refusal", "borderline"] == ("refused", "refused")
    assert said["harm", "borderline"] == ("undecided", "harm looks for harm, not for refusals")
    assert said["llm-refusal", "benign"][1] == "generation failed: out of memory"
    assert len(state.bodies) == 1


def test_no_judge_and_two_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no judge is named: name one"):
        judged(tmp_path, rows_of("No."))
    with pytest.raises(DataError, match="is named more than once: name each judge once"):
        judged(tmp_path, rows_of("No."), spec("http://x/v1"), spec("http://y/v1"))


def test_arms_that_other_judges_saw_are_not_compared(
    tmp_path: Path, server: tuple[str, ChatServer]
) -> None:
    url, _ = server
    run = Run(str(tmp_path), "r")
    pairs = {
        label: (made, judge(run, made, [spec(url, harmful_from=score)], Silent()))
        for label, score in (("W", 5), ("Q0", 4))
        for made in [completed(run, label, rows_of("No."))]
    }
    with pytest.raises(DataError, match="judges"):
        compare(run, pairs, Silent())


def test_the_command_judges_with_settings(
    tmp_path: Path, server: tuple[str, ChatServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = server
    pq.write_table(
        pa.table({"prompt": ["How?", "Why?"], "completion": ["Sure.", "No."]}),
        tmp_path / "ours.parquet",
    )
    judges = f"evaluate.judges=[keyword, {{judge: llm, model: toy, endpoint: '{url}'}}]"
    words = ["judge", str(tmp_path / "ours.parquet"), "--set", judges, "--workers", "0"]
    words += ["--storage", str(tmp_path)]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    assert "llm-harmfulness, harmful: 1 complied, 1 refused" in found.stdout
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    refused = CliRunner().invoke(app, [*words, "--name", "again"])
    assert "the key is refused" in str(refused.exception)
