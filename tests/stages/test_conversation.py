"""Prompts of two turns: the second is asked after the model's own answer to the first."""

from pathlib import Path

import pyarrow as pa
import pytest

from qresafe.artifacts import Run
from qresafe.errors import DataError
from qresafe.hf.chat import render_ids
from qresafe.hf.generate import generate_batch
from qresafe.hf.models import load_model, load_tokenizer, resolve
from qresafe.hf.warm import ModelInput
from qresafe.progress import Silent
from qresafe.records import COMPLETION, PROMPT, require_columns
from qresafe.specs import GenerateSpec, ModelSpec
from qresafe.stages.conversation import converse, messages
from qresafe.stages.endpoint import parameters
from qresafe.stages.engines import VllmJob
from qresafe.stages.generate import generate, table_key
from qresafe.stages.runtime import InProcessRuntime, Row, read_table

SPEC = GenerateSpec(max_new_tokens=6, temperature=0.7)


def prompts(*turns: list[str]) -> pa.Table:
    rows = [
        {"prompt_id": f"p{i}", "axis": "benign", "prompt": first, "follow_ups": rest or None}
        for i, (first, *rest) in enumerate(turns)
    ]
    return pa.Table.from_pylist(rows, schema=PROMPT)


def completions(model: Path, folder: Path, table: pa.Table) -> list[Row]:
    made = generate(
        Run(str(folder), "r"),
        label="W",
        model=ModelInput.of(resolve(ModelSpec(path=str(model)))),
        prompts=table,
        spec=SPEC,
        runtime=InProcessRuntime(),
        progress=Silent(),
    )
    return read_table(made.path / "completions.parquet").to_pylist()


def test_the_second_turn_holds_the_first_answer(tiny_llama: Path, tmp_path: Path) -> None:
    one, two = completions(tiny_llama, tmp_path, prompts(["Hello"], ["Count", "And on?"]))
    assert one["follow_up_answers"] is None
    model, tokenizer = load_model(str(tiny_llama)), load_tokenizer(str(tiny_llama))
    chat = [
        {"role": "user", "content": "Count"},
        {"role": "assistant", "content": two["completion"]},
        {"role": "user", "content": "And on?"},
    ]
    ids = render_ids(tokenizer, chat)
    (alone,) = generate_batch(model, tokenizer, [ids], ["p1/0/1"], SPEC)
    assert two["follow_up_answers"] == [alone.text]
    assert two["new_tokens"] == len(two["completion_ids"]) + len(alone.ids)


def test_prompts_of_one_turn_do_not_change(tiny_llama: Path, tmp_path: Path) -> None:
    plain = prompts(["Hello"], ["Count"])
    alone = completions(tiny_llama, tmp_path / "a", plain)
    mixed = completions(tiny_llama, tmp_path / "b", prompts(["Hello"], ["Count", "And on?"]))
    assert [row["completion_ids"] for row in alone] == [row["completion_ids"] for row in mixed]
    before = plain.drop_columns(["follow_ups"])
    assert table_key(plain) == table_key(before)
    assert table_key(prompts(["Hello", "More"])) != table_key(prompts(["Hello"]))


def test_tables_of_an_earlier_version_are_read() -> None:
    old = pa.Table.from_pylist([], schema=COMPLETION).drop_columns(
        ["follow_ups", "follow_up_answers"]
    )
    assert require_columns(old, COMPLETION, "old").schema == COMPLETION


def test_a_failed_turn_ends_its_conversation_alone() -> None:
    requests: list[Row] = [
        {"prompt": "a", "follow_ups": ["b", "c"]},
        {"prompt": "d", "follow_ups": ["e"]},
        {"prompt": "f"},
    ]
    answers: list[Row] = [
        {"completion": text, "error": None, "new_tokens": 1} for text in ("A", "D", "F")
    ]
    asked: list[list[str]] = []

    def ask(rows: list[Row], turn: int) -> list[Row]:
        asked.append([row["messages"][-1]["content"] for row in rows])
        failed = {"error": "time-out"} if turn == 1 else {"error": None}
        second = {"error": None, "completion": "E", "new_tokens": 2}
        return [failed, second][: len(rows)]

    converse(requests, answers, None, ask)
    assert asked == [["b", "e"]]  # c is not asked: b failed
    assert answers[0]["error"] == "time-out (turn 2)"
    assert (answers[1]["follow_up_answers"], answers[1]["new_tokens"]) == (["E"], 3)
    assert "follow_up_answers" not in answers[2]


def test_messages_alternate_after_the_system_message() -> None:
    request = {"prompt": "a", "follow_ups": ["b", "c"]}
    chat = messages(request, {"completion": "A", "follow_up_answers": ["B"]}, "be kind")
    assert [m["role"][0] + ":" + m["content"] for m in chat] == [
        "s:be kind", "u:a", "a:A", "u:b", "a:B", "u:c"
    ]  # fmt: skip


def test_a_conversation_that_exceeds_the_context_is_refused(
    tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="context: 256"):
        completions(tiny_llama, tmp_path, prompts(["x" * 100, "y" * 150]))


def test_vllm_refuses_follow_ups() -> None:
    job = VllmJob(None, GenerateSpec())  # type: ignore[arg-type]
    with pytest.raises(DataError, match="one turn"):
        job.requests(prompts(["a", "b"]).to_pylist())


def test_an_endpoint_is_sent_the_whole_chat() -> None:
    spec = GenerateSpec(
        engine="openai", endpoint="http://localhost/v1", endpoint_model="m", system_prompt="be kind"
    )
    row = {"prompt_id": "p", "sample": 0, "prompt": "a", "follow_ups": ["b"]}
    first = parameters(row, spec)["messages"]
    chat = messages(row, {"completion": "A", "follow_up_answers": []}, spec.system_prompt)
    assert first == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "a"}]
    assert parameters(row | {"messages": chat}, spec)["messages"] == [
        *first,
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "b"},
    ]
