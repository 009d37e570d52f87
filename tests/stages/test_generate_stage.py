"""The generate stage in this process: order, counts, resuming, errors as rows, bad input."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from servers import ChatServer, serving
from upath import UPath

from qresafe.artifacts import Artifact, Run
from qresafe.errors import CorruptArtifactError, DataError, ModelError
from qresafe.hf.chat import prompt_ids
from qresafe.hf.generate import sequence_logps
from qresafe.hf.models import load_model, load_tokenizer, resolve
from qresafe.hf.warm import ModelInput
from qresafe.progress import Silent
from qresafe.records import COMPLETION, PROMPT
from qresafe.specs import GenerateSpec, ModelSpec
from qresafe.stages.generate import FILE, assemble, generate
from qresafe.stages.runtime import (
    Batch,
    InProcessRuntime,
    is_whole,
    part_path,
    read_table,
    write_table,
)

GREEDY = GenerateSpec(max_new_tokens=6, batch_size=3)


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> ModelInput:
    return ModelInput.of(resolve(ModelSpec(path=str(tiny_llama))))


def prompts(count: int = 7, **changes: Any) -> pa.Table:
    rows = [
        {"prompt_id": f"p{i}", "axis": "benign", "prompt": "word " * (1 + i % 4) + str(i)}
        | {"target": "yes" if i == 2 else None}
        for i in range(count)
    ]
    rows[0] |= changes
    return pa.Table.from_pylist(rows, schema=PROMPT)


def complete(
    folder: Path, model: ModelInput | None, spec: GenerateSpec = GREEDY, **options: Any
) -> Artifact:
    table = options.pop("prompts", None)
    return generate(
        Run(str(folder), "r"),
        label="W",
        model=model,
        prompts=prompts() if table is None else table,
        spec=spec,
        runtime=options.pop("runtime", InProcessRuntime(threads=1)),
        progress=options.pop("progress", Silent()),
    )


def test_one_row_per_prompt_and_sample_in_order(tmp_path: Path, model: ModelInput) -> None:
    spec = GREEDY.model_copy(update={"temperature": 1.0, "samples": 2})
    made = complete(tmp_path, model, spec)
    table = read_table(made.path / FILE)
    assert table.schema == COMPLETION
    rows = table.to_pylist()
    assert [(r["prompt_id"], r["sample"]) for r in rows] == [
        (f"p{i}", s) for i in range(7) for s in range(2)
    ]
    counts = made.manifest.counts
    assert (counts["rows"], counts["errors"]) == (14, 0)
    assert counts["new_tokens"] == sum(len(r["completion_ids"]) for r in rows)
    assert all(r["new_tokens"] == len(r["completion_ids"]) for r in rows)


def test_a_target_is_scored_once(tmp_path: Path, model: ModelInput, tiny_llama: Path) -> None:
    spec = GREEDY.model_copy(update={"temperature": 1.0, "samples": 2})
    table = read_table(complete(tmp_path, model, spec).path / FILE)
    scored = [r for r in table.to_pylist() if r["target_logp"] is not None]
    assert [(r["prompt_id"], r["sample"], r["target_tokens"]) for r in scored] == [("p2", 0, 3)]
    tokenizer = load_tokenizer(tiny_llama)
    ids = prompt_ids(tokenizer, "word word word 2", None)
    target = tokenizer.encode("yes", add_special_tokens=False)
    alone, _ = sequence_logps(load_model(tiny_llama), [ids], [target])
    assert scored[0]["target_logp"] == pytest.approx(alone.item(), abs=1e-4)


def test_a_second_run_computes_nothing(tmp_path: Path, model: ModelInput) -> None:
    first = complete(tmp_path, model)
    again = complete(tmp_path, model)
    assert again.reused
    assert again.key == first.key
    assert complete(tmp_path, model, GREEDY.model_copy(update={"seed": 1})).key != first.key
    other = ModelInput(model.ref, "another content")
    assert complete(tmp_path, other).key != first.key


class Interrupted(Silent):
    """Ends the run like a SIGKILL would, after some parts."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, done: int = 1, note: str = "") -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_a_killed_run_continues_and_mends_a_truncated_part(
    tmp_path: Path, model: ModelInput
) -> None:
    whole = complete(tmp_path / "whole", model)
    folder = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        complete(folder, model, progress=Interrupted(after=2))
    parts = UPath(next(folder.rglob("parts")))
    assert is_whole(part_path(parts, 0))
    damaged = part_path(parts, 1)
    damaged.write_bytes(damaged.read_bytes()[:-20])
    kept = part_path(parts, 0).stat().st_mtime
    made = complete(folder, model)
    assert made.manifest.counts["reused_parts"] == 1
    assert part_path(parts, 0).stat().st_mtime == kept
    assert read_table(made.path / FILE).equals(read_table(whole.path / FILE))


def test_lost_and_repeated_rows_are_noticed(tmp_path: Path, model: ModelInput) -> None:
    made = read_table(complete(tmp_path, model).path / FILE)
    with pytest.raises(CorruptArtifactError, match="6 answers"):
        assemble(prompts(), made.slice(1), 1)
    with pytest.raises(CorruptArtifactError, match=r"8 answers \(7 distinct\) instead of 7"):
        assemble(prompts(), pa.concat_tables([made, made.slice(0, 1)]), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": " "}, "empty prompt in prompt 'p0'"),
        ({"prompt_id": "p1"}, "'p1' occurs 2 times"),
        ({"prompt": "long " * 60}, r"6 of its answer exceed the context in prompt 'p0'"),
    ],
)
def test_bad_prompts_are_named_before_any_work(
    tmp_path: Path, model: ModelInput, change: dict[str, str], message: str
) -> None:
    class Untouched(InProcessRuntime):
        def map_batches(self, *_: Any) -> Any:
            raise AssertionError("expensive work began")

    with pytest.raises(DataError, match=message):
        complete(tmp_path, model, prompts=prompts(**change), runtime=Untouched())


def test_no_prompts_and_a_missing_column(tmp_path: Path, model: ModelInput) -> None:
    with pytest.raises(DataError, match="no prompts"):
        complete(tmp_path, model, prompts=prompts().slice(0, 0))
    with pytest.raises(DataError, match="no column 'prompt'"):
        complete(tmp_path, model, prompts=prompts().drop_columns(["prompt"]))


@pytest.mark.parametrize(("room", "errors"), [(2, 0), (1, 7)])
def test_out_of_memory_halves_once_then_gives_error_rows(
    tmp_path: Path, model: ModelInput, monkeypatch: pytest.MonkeyPatch, room: int, errors: int
) -> None:
    from qresafe.hf import generate as module

    real = module.generate_batch

    def small(model: Any, tokenizer: Any, prompts: Any, keys: Any, spec: Any) -> Any:
        if len(prompts) > room:
            raise torch.OutOfMemoryError("no memory left")
        return real(model, tokenizer, prompts, keys, spec)

    monkeypatch.setattr(module, "generate_batch", small)
    # 7 prompts in batches of 4 and 3 halve to 2+2 and 2+1: all fit if 2 do, of 1 only the last.
    made = complete(tmp_path, model, GREEDY.model_copy(update={"batch_size": 4}))
    rows = read_table(made.path / FILE).to_pylist()
    bad = [row for row in rows if row["error"]]
    assert len(rows) == 7
    assert len(bad) == (errors and 6)
    assert made.manifest.counts["errors_by_kind"] == ({"out of memory": 6} if errors else {})
    assert all(row["finish"] == "error" for row in bad)


def test_vllm_without_ray_says_so(tmp_path: Path, model: ModelInput) -> None:
    with pytest.raises(Exception, match="engine 'vllm' runs on Ray workers with a GPU"):
        complete(tmp_path, model, GREEDY.model_copy(update={"engine": "vllm"}))


def test_parts_on_an_object_store(model: ModelInput) -> None:
    class Echo:
        def setup(self, device: str) -> Any:
            return lambda rows: pa.table({"x": [row["x"] for row in rows]})

    parts = UPath("memory://generate-test/parts")
    batches = [Batch(0, [{"x": 1}]), Batch(1, [{"x": 2}])]
    InProcessRuntime().map_batches(Echo(), batches, parts, Silent())
    assert read_table(part_path(parts, 1))["x"].to_pylist() == [2]
    write_table(part_path(parts, 0), pa.table({"x": [9]}))  # a whole part is left alone
    spent = InProcessRuntime().map_batches(Echo(), batches, parts, Silent())
    assert spent.reused == 2
    assert read_table(part_path(parts, 0))["x"].to_pylist() == [9]


# ---- engine openai, against a real server on the loopback interface


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ChatServer]]:
    monkeypatch.setenv("OPENAI_API_KEY", "right")
    state = ChatServer(lambda body: f"{body['messages'][-1]['content']} {body['seed']}")
    with serving(state) as url:
        yield url, state


def remote(url: str, **changes: Any) -> GenerateSpec:
    options = {"endpoint_model": "toy", "timeout_seconds": 2, "retries": 1, "batch_size": 4}
    return GenerateSpec.model_validate({"engine": "openai", "endpoint": url} | options | changes)


def table_of(*texts: str) -> pa.Table:
    rows = [{"prompt_id": t, "axis": "benign", "prompt": t} for t in texts]
    return pa.Table.from_pylist(rows, schema=PROMPT)


def test_an_endpoint_answers_or_leaves_error_rows(
    tmp_path: Path, endpoint: tuple[str, ChatServer]
) -> None:
    url, server = endpoint
    texts = ("fine", "LIMITED", "BROKEN", "ALWAYS-LIMITED", "CUT", "HANGS")
    made = complete(tmp_path, None, remote(url), prompts=table_of(*texts))
    rows = {row["prompt_id"]: row for row in read_table(made.path / FILE).to_pylist()}
    for text in ("fine", "LIMITED", "BROKEN"):
        assert rows[text]["completion"].startswith(text)
        assert (rows[text]["new_tokens"], rows[text]["prompt_tokens"]) == (5, 30)
    kinds = {"rate limit": 1, "malformed answer": 1, "time-out": 1}
    assert made.manifest.counts["errors_by_kind"] == kinds
    assert rows["CUT"]["finish"] == "error"
    assert server.calls["BROKEN"] == 2
    assert "right" not in (made.path / "manifest.json").read_text()


def test_an_endpoint_is_checked_before_the_work(
    tmp_path: Path, endpoint: tuple[str, ChatServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, server = endpoint
    one = table_of("fine")
    with pytest.raises(ModelError, match=r"no model 'toi' in .*did you mean toy"):
        complete(tmp_path, None, remote(url, endpoint_model="toi"), prompts=one)
    with pytest.raises(ModelError, match="no answer"):
        complete(tmp_path, None, remote("http://127.0.0.1:9/v1"), prompts=one)
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(ModelError, match="the key is refused"):
        complete(tmp_path, None, remote(url), prompts=one)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ModelError, match="no OPENAI_API_KEY in the environment"):
        complete(tmp_path, None, remote(url), prompts=one)
    assert not server.calls
