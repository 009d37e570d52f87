"""`qresafe plan` and the dry run of `qresafe reproduce` as a user sees them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qresafe.cli import main

PRESET = "llama2-7b-chat-int4-4xa100"


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as leaving:
            main(list(arguments))
        return leaving.value.code, *capsys.readouterr()

    return run


def test_what_fits_is_a_table_and_ends_with_0(cli: Any) -> None:
    code, out, err = cli("plan", PRESET, "--cluster", "4xA100-80")
    assert code == 0, err
    lines = out.splitlines()
    assert "6.74 B weights, on 4xA100-80" in lines[0]
    patch = next(line for line in lines if line.startswith("patch "))
    assert "no" not in patch.split()
    assert "USD" in out


def test_what_cannot_fit_ends_with_2_and_says_what_would(cli: Any) -> None:
    wider = ("--set", "patch.micro_batch_size=2", "--set", "patch.zero_stage=2")
    code, out, err = cli("plan", PRESET, "--cluster", "4xA10G-24", *wider, "--json")
    assert code == 2
    assert "would fit: --set patch.micro_batch_size=" in err
    assert "Traceback" not in err
    found = json.loads(out)
    assert found["fits"] is False
    patch = next(stage for stage in found["stages"] if stage["name"] == "patch")
    assert patch["gib"] == pytest.approx(sum(patch["parts_gib"].values()))
    assert patch["gib"] > patch["available_gib"]


def test_own_hardware(cli: Any, tmp_path) -> None:
    file = tmp_path / "mine.yaml"
    gpu = "{memory_gib: 500, tflops: 100, bandwidth_gbs: 1000, host_gib: 512, price_per_hour: 3}"
    core = "{tflops: 0.1, bandwidth_gbs: 10, price_per_hour: 0}"
    file.write_text(f"as_of: today\ngpus: {{Mine-500: {gpu}}}\ncpu: {core}\nreserve_gib: 1\n")
    arguments = ("plan", PRESET, "--cluster", "2xMine-500", "--hardware", str(file), "--json")
    code, out, err = cli(*arguments)
    assert code == 0, err
    found = json.loads(out)
    assert found["cost_usd"] == pytest.approx(2 * 3 * found["hours"])
    file = tmp_path / "broken.yaml"
    file.write_text("gpus: {}")
    code, _, err = cli("plan", PRESET, "--hardware", str(file))
    assert (code, "no usable hardware file" in err) == (2, True)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--cluster", "4xA100"], "A100-40"),
        (["--set", "model.path=meta-llama/Llama-2-7b"], "meta-llama/Llama-2-7b-hf"),
        (["--set", "model.path=/nonexist"], "no model folder '/nonexist' in model.path: give"),
        (["--set", "model.path=./nope"], "no model folder './nope'"),
        (["--set", "model.path=~/nope"], "no model folder '~/nope'"),
        (["--set", "model.path=nope/"], "no model folder 'nope/'"),
        (["--set", "model.path=a/b/c"], "no model folder 'a/b/c'"),
        (["--set", "model.path=a b/c"], "the shape of 'a b/c' is not known"),
        (["--set", "model.path=s3://a/b"], "the shape of 's3://a/b' is not known"),
    ],
)
def test_mistakes_are_told_in_a_sentence(cli: Any, option: list[str], said: str) -> None:
    code, _, err = cli("plan", PRESET, *option)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1


def test_a_dry_run_tells_what_each_row_needs(cli: Any) -> None:
    arguments = ("--preset", "llama2-7b", "--dry-run", "--cluster", "8xH100-80")
    code, out, err = cli("reproduce", "table4", *arguments)
    assert code == 0, err
    assert "GPU-hours" in out
    assert "!" in out  # full fine-tuning of 7 B weights does not fit one GPU
    assert out.startswith("meta-llama/Llama-2-7b-chat-hf, 6.74 B weights, on 8xH100-80; 1 seed(s)")
    code, out, err = cli("reproduce", "table4", *arguments, "--seed", "0", "--seed", "1", "--json")
    assert code == 0, err
    told = json.loads(out)
    hours = [row["needs"]["device_hours"] for row in told["tables"]["table4"]]
    assert told["device_hours"] == pytest.approx(2 * sum(hours))  # of two seeds
