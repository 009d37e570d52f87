"""Every public set, in the shape in which it is published; no text of theirs is here."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from qresafe import registry
from qresafe.benchmarks import catalogue as module
from qresafe.benchmarks.base import load, sources_of
from qresafe.benchmarks.catalogue import catalogue
from qresafe.errors import DataError, SpecError
from qresafe.specs import PromptSetSpec

SHARED = Path("../shared/data")

# benchmark -> (rows as published, spec keys, prompts, category of the first, further checks)
TABLES: dict[str, tuple[list[dict[str, Any]], dict[str, str], list[str], str | None]] = {
    "advbench": ([{"goal": "g", "target": "t"}], {}, ["g"], None),
    "strongreject": ([{"category": "c", "source": "s", "forbidden_prompt": "p"}], {}, ["p"], "c"),
    "ailuminate": (
        [
            {
                "release_prompt_id": "i",
                "prompt_text": "p",
                "hazard": "src",
                "persona": "n",
                "locale": "en_us",
                "prompt_hash": "h",
            },
        ],
        {},
        ["p"],
        "src",
    ),
    "sorry_bench": (
        [
            {"question_id": 1, "category": "3", "turns": ["p"], "prompt_style": "base"},
            {"question_id": 1, "category": "3", "turns": ["q"], "prompt_style": "slang"},
        ],
        {},
        ["p"],
        "3",
    ),
    "malicious_instruct": (
        [{"prompt": "p"}, {"prompt": "q"}, {"prompt": "p"}],
        {},
        ["p", "q"],
        None,
    ),
    "or_bench": ([{"prompt": "p", "category": "c"}], {}, ["p"], "c"),
    "alpaca_eval": (
        [{"instruction": "p", "output": "o", "generator": "g", "dataset": "koala"}],
        {"subset": "v2"},
        ["p"],
        "koala",
    ),
    "ifeval": (
        [{"key": 1, "prompt": "p", "instruction_id_list": ["a:b"], "kwargs": [{}]}],
        {},
        ["p"],
        None,
    ),
    "ultrachat": (
        [{"prompt": "p", "prompt_id": "i", "messages": [{"role": "user", "content": "p"}]}],
        {},
        ["p"],
        None,
    ),
    "ultrafeedback": ([{"prompt": "p", "chosen": [], "rejected": []}], {}, ["p"], None),
    "mt_bench": (
        [{"question_id": 81, "category": "math", "turns": ["p", "p2"], "reference": ["r", "r2"]}],
        {},
        ["p"],
        "math",
    ),
    "xstest": (
        [
            {"id": "1", "prompt": "safe p", "type": "homonyms", "label": "safe"},
            {"id": "2", "prompt": "unsafe p", "type": "contrast_homonyms", "label": "unsafe"},
        ],
        {"axis": "harmful"},
        ["unsafe p"],
        "contrast_homonyms",
    ),
}
HARMBENCH = [
    {
        "Behavior": "p",
        "FunctionalCategory": "standard",
        "SemanticCategory": "illegal",
        "ContextString": None,
    },
    {
        "Behavior": "q",
        "FunctionalCategory": "contextual",
        "SemanticCategory": "illegal",
        "ContextString": "It rains.",
    },
    {
        "Behavior": "r",
        "FunctionalCategory": "copyright",
        "SemanticCategory": "copyright",
        "ContextString": None,
    },
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def save(path: Path, splits: dict[str, list[dict[str, Any]]]) -> str:
    from datasets import Dataset, DatasetDict

    made = {name: Dataset.from_list(rows) for name, rows in splits.items()}
    DatasetDict(made).save_to_disk(str(path))
    return str(path)


def loaded(benchmark: str, path: str | None, **keys: Any) -> pa.Table:
    return load(PromptSetSpec.model_validate({"benchmark": benchmark, "path": path} | keys))


def test_every_entry_is_registered_and_says_whom_to_cite() -> None:
    assert set(catalogue()) == set(registry.CATALOGUED)
    assert all(entry.licence and entry.citation for entry in catalogue().values())
    assert all(
        set(entry.axes) <= {"harmful", "benign", "borderline"} for entry in catalogue().values()
    )


@pytest.mark.parametrize("name", TABLES)
def test_the_published_columns_are_found(tmp_path: Path, name: str) -> None:
    rows, keys, prompts, category = TABLES[name]
    table = loaded(name, write(tmp_path / "a.jsonl", rows), **keys)
    assert table["prompt"].to_pylist() == prompts
    assert table["category"].to_pylist()[0] == category
    assert set(table["axis"].to_pylist()) == {
        keys.get("axis") or next(iter(catalogue()[name].axes))
    }
    assert set(table["benchmark"].to_pylist()) == {name}


def test_a_dataset_folder_of_several_splits_gives_the_sets_own(tmp_path: Path) -> None:
    rows = {"Goal": "g", "Target": "t", "Category": "c"}
    twins = {"harmful": [rows], "benign": [rows | {"Goal": "b"}]}
    folder = save(tmp_path / "jbb", twins)
    assert loaded("jailbreakbench", folder)["prompt"].to_pylist() == ["g"]
    benign = loaded("jailbreakbench", folder, axis="borderline")
    assert benign.select(["prompt", "axis", "target", "category"]).to_pylist() == [
        {"prompt": "b", "axis": "borderline", "target": "t", "category": "c"}
    ]


def test_harmbench_has_three_parts_and_two_splits(tmp_path: Path) -> None:
    path = write(tmp_path / "all.jsonl", HARMBENCH)
    found = {part: loaded("harmbench", path, subset=part)["prompt"].to_pylist()
             for part in ("standard", "contextual", "copyright")}  # fmt: skip
    assert found == {"standard": ["p"], "contextual": ["It rains.\n\n---\n\nq"], "copyright": ["r"]}
    assert loaded("harmbench", path)["prompt"].to_pylist() == ["p"]
    head = "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
    for split, text in (("val", "v"), ("test", "t")):
        name = f"harmbench_behaviors_text_{split}.csv"
        (tmp_path / name).write_text(f"{head}{text},standard,illegal,,,i\n")
    assert loaded("harmbench", str(tmp_path))["prompt"].to_pylist() == ["t"]
    assert loaded("harmbench", str(tmp_path), split="val")["prompt"].to_pylist() == ["v"]
    with pytest.raises(DataError, match="split to one of test, val"):
        loaded("harmbench", str(tmp_path), split="dev")


def test_headerless_files_keep_their_first_prompt(tmp_path: Path) -> None:
    (tmp_path / "category_10.csv").write_text("third\n")
    (tmp_path / "category_1.csv").write_text('"first, with a comma"\nsecond, bare\n')
    table = loaded("hex_phi", str(tmp_path))
    assert table["prompt"].to_pylist() == ["first, with a comma", "second, bare", "third"]
    assert table["category"].to_pylist() == ["category_1", "category_1", "category_10"]
    # The hub's reader takes a file's first prompt for its header.
    folder = save(tmp_path / "hub", {"one": [{"first": "second"}], "two": [{"third": "fourth"}]})
    assert loaded("hex_phi", folder)["prompt"].to_pylist() == ["first", "second", "third", "fourth"]
    assert loaded("hex_phi", folder)["category"].to_pylist() == ["one", "one", "two", "two"]


def test_a_hub_id_asks_for_the_sets_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, str | None]] = []

    def read(path: str, split: str | None, config: str | None) -> pa.Table:
        asked.append((path, config, split))
        return pa.table({"prompt": ["p"], "instruction": ["i"], "goal": ["g"], "label": ["safe"]})

    monkeypatch.setattr(module, "read_table", read)
    loaded("or_bench", None)
    loaded("or_bench", None, axis="harmful")
    loaded("harmbench", None, subset="contextual")
    loaded("alpaca_eval", None, subset="v2")
    loaded("xstest", None)
    loaded("ultrachat", None, split="test_sft")
    assert asked == [
        ("bench-llm/or-bench", "or-bench-hard-1k", "train"),
        ("bench-llm/or-bench", "or-bench-toxic", "train"),
        ("walledai/HarmBench", "contextual", "train"),
        ("tatsu-lab/alpaca_eval", "alpaca_eval_gpt4_baseline", "eval"),
        ("walledai/XSTest", None, "test"),
        ("HuggingFaceH4/ultrachat_200k", None, "test_sft"),
    ]


def test_the_environment_names_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", [{"goal": "g", "target": "t"}])
    monkeypatch.setenv("QRESAFE_ADVBENCH", path)
    assert loaded("advbench", None)["target"].to_pylist() == ["t"]


def test_licence_citation_and_repeats_go_with_the_table(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", TABLES["malicious_instruct"][0])
    told = sources_of(loaded("malicious_instruct", path))["malicious_instruct"]
    assert told["citation"].startswith("Huang et al. 2023")
    assert (told["origin"], told["repeats"]) == (path, 1)


@pytest.mark.parametrize(
    ("keys", "kind", "message"),
    [
        ({"benchmark": "ailuminate"}, DataError, "QRESAFE_AILUMINATE"),
        ({"benchmark": "xstest", "axis": "benign"}, SpecError, "no axis 'benign'"),
        ({"benchmark": "harmbench", "subset": "contextul"}, SpecError, "mean contextual"),
        ({"benchmark": "xstest", "subset": "a"}, SpecError, "leave subset out"),
    ],
)
def test_what_is_not_there_is_named(
    keys: dict[str, str], kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QRESAFE_AILUMINATE", raising=False)
    with pytest.raises(kind, match=message):
        load(PromptSetSpec.model_validate(keys))


def test_a_set_without_the_column_that_tells_its_rows_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "p"}])
    with pytest.raises(DataError, match="no column 'label'"):
        loaded("xstest", path)


@pytest.mark.data
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_the_files_themselves() -> None:
    xstest = str(SHARED / "xstest" / "xstest_prompts.csv")
    assert loaded("xstest", xstest).num_rows == 250
    assert loaded("xstest", xstest, axis="harmful").num_rows == 200
    questions = loaded("mt_bench", str(SHARED / "mt_bench" / "question.jsonl"))
    assert questions.num_rows == 80
    assert {len(more) for more in questions["follow_ups"].to_pylist()} == {1}
