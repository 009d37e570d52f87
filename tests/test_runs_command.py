"""`qresafe runs`: tables, JSON, and a prune that asks first."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from qresafe.cli import main
from qresafe.commands.runs import size
from tests.stages.test_runs import cut_off, make


@pytest.fixture
def storage(tmp_path: Path) -> str:
    make(str(tmp_path), "a", "quantize", {"bits": 4}, work=2048)
    make(str(tmp_path), "b", "quantize", {"bits": 3})
    cut_off(str(tmp_path), "b", "patch")
    return str(tmp_path)


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as leaving:
        main(["runs", *words])
    return int(leaving.value.code or 0)


def test_list_show_and_diff(storage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "--storage", storage) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["a", "finished", "1"]
    assert "1 + 1 unfinished" in lines[2]
    assert run("list", "--storage", storage, "--json") == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["state"], second["unfinished"], first["newest"]) == ("finished", 1, "quantize")
    assert run("show", "b", "--storage", storage) == 0
    assert "unfinished" in capsys.readouterr().out
    assert run("diff", "a", "b", "--storage", storage) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["quantize.bits", "4", "3"]
    assert run("show", "c", "--storage", storage) == 2
    assert "error: no run named 'c'" in capsys.readouterr().err


def test_prune_shows_asks_and_only_then_removes(
    storage: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (work,) = Path(storage).glob("runs/a/quantize/*/work")
    assert run("prune", "--storage", storage, "--dry-run") == 0
    assert "2.0 KiB" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert run("prune", "--storage", storage) == 1  # nobody says yes
    assert work.exists()
    assert run("prune", "--storage", storage, "--yes") == 0
    assert "freed 2.0 KiB" in capsys.readouterr().out
    assert not work.exists()
    assert list(Path(storage).glob("runs/b/patch/*/work/part"))


def test_whole_runs_must_be_named_or_old(storage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("prune", "--storage", storage, "--whole", "--yes") == 2
    assert "--whole would remove every run" in capsys.readouterr().err
    assert run("prune", "--storage", storage, "--whole", "--yes", "--older-than", "1") == 0
    assert sorted(path.name for path in Path(storage, "runs").iterdir()) == ["a", "b"]
    assert run("prune", "a", "--storage", storage, "--whole", "--yes") == 0
    assert [path.name for path in Path(storage, "runs").iterdir()] == ["b"]


@pytest.mark.parametrize(
    ("storage", "keys", "said"),
    [
        ("s3://bucket/x", False, "NoCredentialsError"),
        ("s3://", False, "NoCredentialsError"),
        ("s3://bucket/x", True, "EndpointConnectionError"),
        ("gs://bucket/x", False, "ImportError"),
    ],
)
def test_a_storage_that_cannot_be_used_is_one_sentence(
    storage: str,
    keys: bool,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    if said == "ImportError":  # as where gcsfs is not installed
        monkeypatch.setitem(sys.modules, "gcsfs", None)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    if keys:
        names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL")
        for name, value in zip(names, ("a", "b", "http://127.0.0.1:1"), strict=True):
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # a port that nothing hears stays so
    S3FileSystem.clear_instance_cache()
    for words in (["list"], ["show", "a"], ["prune", "a", "--yes"]):
        assert run(*words, "--storage", storage) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: the storage cannot be used ({said}: ")
        assert "your keys for it" in error
        assert "Traceback" not in error


def test_sizes_in_words() -> None:
    # 1536 / 1024 = 1.5; 3 * 2**30 / 1024**3 = 3
    assert [size(n) for n in (0, 1023, 1536, 3 * 2**30)] == ["0 B", "1023 B", "1.5 KiB", "3.0 GiB"]
