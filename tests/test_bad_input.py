"""Everything that a user can get wrong: one sentence, exit code 2, before expensive work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qresafe.cli import main

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tiny_llama: Path, tmp_path: Path) -> Refused:
    """Run a command that must fail with one sentence; return the sentence."""

    def run(*sets: str, command: str = "run", preset: str = "cpu-smoke") -> str:
        defaults = (
            f"storage={tmp_path / 'store'}",
            f"model.path={tiny_llama}",
            "resources.workers=0",
        )
        given = [word for each in (*defaults, *sets) for word in ("--set", each)]
        with pytest.raises(SystemExit) as leaving:
            main([command, preset, *given])
        out, err = capsys.readouterr()
        lines = err.strip().splitlines()
        assert leaving.value.code == 2, err
        assert out == ""
        assert "Traceback" not in err
        assert lines[-1].startswith("error: ")
        done = [line for line in lines if line.startswith("+ ") and "start Ray" not in line]
        assert done == [], "work was done before"
        return lines[-1]

    return run


def prompts(path: Path, **more: object) -> str:
    """Return the override that evaluates on a prompt file."""
    return f"evaluate.prompts={json.dumps([{'benchmark': 'prompts', 'path': str(path), **more}])}"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_unknown_judge(refused: Refused) -> None:
    assert "did you mean keyword" in refused("evaluate.judges=[keywrd]")
    assert "did you mean refusal" in refused("pairs.judge=refusl")


def test_unknown_benchmark(refused: Refused) -> None:
    assert "did you mean advbench" in refused("evaluate.prompts=[{benchmark: advbnch}]")


def test_missing_prompt_file(refused: Refused) -> None:
    assert "absent.csv" in refused("evaluate.prompts=[{benchmark: advbench, path: absent.csv}]")


@pytest.mark.parametrize(
    ("content", "column", "fragments"),
    [
        ("prompt,x\na,1\nb,2,3\n", "prompt", ["mine.csv", "malformed CSV"]),
        ("text,x\na,1\n", "prompt", ["mine.csv", "'prompt'"]),
        ("text,x\na,1\n", "txt", ["mine.csv", "'txt'", "text"]),
        ("prompt,x\na,1\n,2\n", "prompt", ["mine.csv", "empty"]),
        ("", "prompt", ["mine.csv"]),
        ("prompt\n", "prompt", ["mine.csv"]),
    ],
)
def test_malformed_prompt_files(
    refused: Refused, tmp_path: Path, content: str, column: str, fragments: list[str]
) -> None:
    path = write(tmp_path, "mine.csv", content)
    text = refused(prompts(path, column=column))
    for fragment in fragments:
        assert fragment in text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mine.jsonl", '{"prompt": "a"}\n{"prompt": \n'),
        ("mine.jsonl", '{"prompt": 3}\n'),
        ("mine.parquet", "not parquet"),
        ("mine.doc", "hello"),
    ],
)
def test_other_malformed_prompt_files(
    refused: Refused, tmp_path: Path, name: str, content: str
) -> None:
    assert name in refused(prompts(write(tmp_path, name, content), column="prompt"))


def test_malformed_calibration(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "pool.parquet"
    pq.write_table(pa.table({"prompt": ["a"], "axis": ["harmfull"]}), path)
    assert "harmfull" in refused(f"pairs.path={path}")
    assert "absent.csv" in refused("pairs.path=absent.csv")


def test_missing_model(refused: Refused, tmp_path: Path) -> None:
    assert "absent" in refused(f"model.path={tmp_path / 'absent'}")
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(f"model.path={tmp_path / 'empty'}")


def test_model_without_a_chat_template(refused: Refused, tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(tiny_llama, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert "chat template" in refused(f"model.path={folder}")


def test_a_model_file_that_is_cut_short(refused: Refused, tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(tiny_llama, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert str(folder) in refused(f"model.path={folder}")


def test_storage_that_cannot_be_written(refused: Refused, tmp_path: Path) -> None:
    blocked = write(tmp_path, "file", "not a folder")
    assert str(blocked) in refused(f"storage={blocked}/sub")
    assert "nosuchscheme" in refused("storage=nosuchscheme://bucket")


def test_gpus_that_are_not_there(refused: Refused) -> None:
    assert "GPU" in refused("resources.gpus_per_worker=1")


@pytest.mark.ray
@pytest.mark.parametrize("command", ["quantize", "generate"])
def test_more_workers_than_the_cluster_has_room_for(refused: Refused, command: str) -> None:
    text = refused("resources.workers=1", "resources.gpus_per_worker=4", command=command)
    assert "GPUs" in text
    assert "room for 0" in text
