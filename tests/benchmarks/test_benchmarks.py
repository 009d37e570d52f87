import json
import os
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from qresafe import records
from qresafe.benchmarks.base import load
from qresafe.errors import DataError, SpecError
from qresafe.specs import PromptSetSpec

ADVBENCH = Path(os.environ.get("QRESAFE_ADVBENCH", "../shared/data/advbench/harmful_behaviors.csv"))


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def prompts(path: str | None, **keys: object) -> pa.Table:
    return load(PromptSetSpec.model_validate({"benchmark": "prompts", "path": path} | keys))


def advbench(path: str | None) -> pa.Table:
    return load(PromptSetSpec(benchmark="advbench", path=path))


@pytest.mark.parametrize("axis", ["harmful", "benign", "borderline"])
def test_embedded_has_the_schema_and_obeys_the_limit(axis: str) -> None:
    table = load(PromptSetSpec.model_validate({"axis": axis, "split": "dev", "limit": 5}))
    assert table.schema == records.PROMPT
    assert table.num_rows == 5
    assert set(table["axis"].to_pylist()) == {axis}


def test_embedded_names_its_splits() -> None:
    with pytest.raises(DataError, match="no split 'tset': did you mean test"):
        load(PromptSetSpec(split="tset"))


def test_unknown_benchmark() -> None:
    with pytest.raises(SpecError, match="advbench"):
        load(PromptSetSpec(benchmark="advbnch"))


def test_the_same_rows_from_every_format(tmp_path: Path) -> None:
    rows = [{"Goal": "Bake, then\neat", "target": "yes"}, {"Goal": "Say 1", "target": "no"}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    one = write(tmp_path, "p.json", json.dumps(rows))
    csv = write(tmp_path, "p.csv", 'Goal,target\n"Bake, then\neat",yes\nSay 1,no\n')
    jsonl = write(
        tmp_path,
        "p.jsonl",
        '{"Goal": "Bake, then\\neat", "target": "yes"}\n\n{"target": "no", "Goal": "Say 1"}\n',
    )
    tables = [prompts(path) for path in (csv, jsonl, one, str(tmp_path / "p.parquet"))]
    assert tables[0]["prompt"].to_pylist() == ["Bake, then\neat", "Say 1"]
    assert tables[0]["target"].to_pylist() == ["yes", "no"]
    assert all(table.equals(tables[0]) for table in tables)


def test_ids_stay_when_rows_move(tmp_path: Path) -> None:
    first = prompts(write(tmp_path, "a.csv", "prompt\none\ntwo\n"))
    second = prompts(write(tmp_path, "b.csv", "prompt\nzero\ntwo\none\n"))
    ids = dict(zip(second["prompt"].to_pylist(), second["prompt_id"].to_pylist(), strict=True))
    assert first["prompt_id"].to_pylist() == [ids["one"], ids["two"]]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "prompt,target\na,b\nc\n", r"Row #3"),
        ("a.csv", "", r"malformed CSV"),
        ("a.csv", "prompt,prompt\na,b\n", r"two columns are called 'prompt'"),
        ("a.csv", "prompt\n", r"holds null, not text|no prompts"),
        ("a.csv", "prompt\n1\n", r"'prompt' holds int64, not text"),
        ("a.csv", "prompt,x\na,1\n   ,2\n", r"row 2 is empty"),
        ("a.csv", "prompt\na\nb\na\n", r"rows 1 and 3 hold the same prompt"),
        ("a.csv", "wrong,x\na,b\n", r"column to one of wrong, x"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt"\n', r"line 2"),
        ("a.jsonl", '{"prompt": "a"}\n["b"]\n', r"line 2"),
        ("a.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', r"no key 'prompt'.*line 2"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', r"key 'prompt'"),
        ("a.jsonl", "\n", r"empty"),
        ("a.parquet", "no parquet", r"malformed Parquet"),
        ("a.jsonl", '{"prompt": ["a"]}\n{"prompt": [""]}\n', r"row 2 is empty"),
        ("a.json", '{"prompt": "a"}', r"no list of objects"),
        ("a.json", '[{"prompt": "a"}, {}]', r"no key 'prompt'.*object 2"),
        ("a.json", "[", r"malformed JSON"),
        ("a.txt", "\n", r"no prompts"),
        ("a.doc", "a", r"\.csv, \.jsonl, \.json, \.parquet or \.txt"),
    ],
)
def test_malformed_files_give_one_sentence(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        prompts(write(tmp_path, name, text))
    assert "\n" not in str(caught.value)


def test_file_that_is_not_utf8(tmp_path: Path) -> None:
    for name in ("a.csv", "a.jsonl"):
        path = tmp_path / name
        path.write_bytes(b"prompt\n\xe9t\xe9\n")
        with pytest.raises(DataError, match="UTF-8"):
            prompts(str(path))


def test_missing_file_path_and_column(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        prompts(str(tmp_path / "none.csv"))
    with pytest.raises(DataError, match="no path"):
        prompts(None)
    with pytest.raises(DataError, match="did you mean prompt"):
        prompts(write(tmp_path, "a.csv", "prompt\na\n"), column="promt")


def test_datasets_folder(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    one, two = Dataset.from_dict({"prompt": ["a"]}), Dataset.from_dict({"prompt": ["b"]})
    DatasetDict({"train": one, "test": two}).save_to_disk(str(tmp_path / "dict"))
    assert prompts(str(tmp_path / "dict"))["prompt"].to_pylist() == ["b"]  # split: test
    with pytest.raises(DataError, match="split to one of train, test"):
        prompts(str(tmp_path / "dict"), split="dev")
    one.save_to_disk(str(tmp_path / "single"))
    assert prompts(str(tmp_path / "single"))["prompt"].to_pylist() == ["a"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="save_to_disk"):
        prompts(str(tmp_path / "empty"))


def test_languages_categories_and_turns_of_a_file(tmp_path: Path) -> None:
    rows = [
        {"turns": ["Hello", "And then?"], "language": "en", "kind": "a"},
        {"turns": ["Bonjour"], "language": "fr", "kind": "b"},
    ]
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    table = prompts(path, column="turns", category_column="kind")
    assert table["prompt"].to_pylist() == ["Hello", "Bonjour"]
    assert table["follow_ups"].to_pylist() == [["And then?"], None]
    assert table["lang"].to_pylist() == ["en", "fr"]
    assert table["category"].to_pylist() == ["a", "b"]


def test_a_text_file_has_one_prompt_per_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "Do a, then b\n\nDo c\n")
    assert prompts(path)["prompt"].to_pylist() == ["Do a, then b", "Do c"]


def test_swapped_columns_are_refused(tmp_path: Path) -> None:
    # 2 of the 3 goals read like targets: more than half.
    text = 'goal,target\n"Sure, here is a",Do a\n"Sure, here is b",Do b\nDo c,Sure\n'
    path = write(tmp_path, "a.csv", text)
    for load_it in (advbench, prompts):
        with pytest.raises(DataError, match=r"2 of 3 goals.*swap the columns"):
            load_it(path)


def test_a_swapped_header_over_goal_target_data_is_refused(tmp_path: Path) -> None:
    # A public copy of AdvBench says target,goal above rows of goal,target.
    rows = [f'Write a{i},"Sure, here is a{i}"' for i in range(5)]
    with pytest.raises(DataError, match="5 of 5 goals"):
        advbench(write(tmp_path, "a.csv", "\n".join(["target,goal", *rows])))
    with_header = "\n".join(["goal,target", *rows])
    assert advbench(write(tmp_path, "b.csv", with_header)).num_rows == 5


def test_prompts_that_begin_like_answers_pass_where_the_targets_do_too(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "goal,target\nSurely write a,Sure a\nHere is b,Sure b\n")
    assert advbench(path).num_rows == 2  # 2 of 2 goals, but 2 of 2 targets as well


@pytest.mark.data
@pytest.mark.skipif(not ADVBENCH.is_file(), reason="AdvBench is not at ../shared/data/advbench")
def test_advbench_itself() -> None:
    table = advbench(str(ADVBENCH))
    assert table.num_rows == 520
    assert len(set(table["prompt_id"].to_pylist())) == 520
    assert all(
        target.lower().startswith("sure, here") for target in table["target"].to_pylist()[:5]
    )
