"""The command line: help, exit codes, one sentence for a mistake, results on stdout alone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
import yaml

from qresafe import __version__
from qresafe.cli import main
from qresafe.commands.launch import launch, user_error
from qresafe.errors import DataError
from qresafe.presets import load_experiment
from qresafe.specs import ExperimentSpec

COMMANDS = [
    *(["demo"], ["run"], ["show"], ["quantize"], ["generate"], ["judge"], ["pairs"], ["patch"]),
    *(["export"], ["compare"], ["report"], ["gate"], ["doctor"], ["demo-model"]),
    *(["attack"], ["benchmarks"], ["ifeval"]),
    *(["judge", "run"], ["judge", "sheet"], ["judge", "ingest"]),
    *(["patch", "run"], ["patch", "apply"], ["patch", "revert"], ["patch", "verify"]),
    *(["patch", "keygen"], ["patch", "sign"]),
    ["demo-model", "build"],
    *(["score"], ["score", "mt-bench"], ["score", "alpaca-eval"]),
    ["search"],
]
HEAVY = ["torch", "ray", "transformers", "deepspeed", "datasets", "pyarrow", "numpy", "scipy"]
HEAVY += ["pandas", "matplotlib", "huggingface_hub"]


class Outcome:
    """What one command line did in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
        with pytest.raises(SystemExit) as leaving:
            main(list(arguments))
        self.code = leaving.value.code
        self.out, self.err = capsys.readouterr()

    def sentence(self) -> str:
        """Return the mistake's one sentence, having checked that it is one."""
        assert self.code == 2
        assert self.out == ""
        assert "Traceback" not in self.err
        last = self.err.strip().splitlines()[-1]
        assert last.startswith("error: ")
        assert last.endswith((".", "?"))
        return last


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]):
    return lambda *arguments: Outcome(capsys, *arguments)


# ---------------------------------------------------------------- start-up


def test_help_imports_nothing_heavy() -> None:
    code = f"""
import sys
from qresafe.cli import main
try:
    main(["--help"])
finally:
    print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stderr.strip() == "[]"
    for command in ("demo", "quantize", "generate", "doctor", "patch"):
        assert command in found.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(cli, command: list[str]) -> None:
    outcome = cli(*command, "--help")
    assert outcome.code == 0
    assert "Usage" in outcome.out
    assert " ".join(command) in outcome.out


def test_importing_all_commands_is_light_too() -> None:
    code = f"import sys, qresafe.cli; print([m for m in {HEAVY} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_version(cli) -> None:
    assert cli("--version").out.strip() == __version__


def test_the_installed_command_is_this_one() -> None:
    command = Path(sys.executable).with_name("qresafe")
    found = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == __version__


# ---------------------------------------------------------------- show


def test_show_prints_what_run_accepts(cli, tmp_path: Path) -> None:
    arguments = ["demo", "--set", "patch.mask.tau=0.4", "--workers", "0", "--storage", "s3://b/x"]
    shown = cli("show", *arguments, "--name", "007").out
    path = tmp_path / "shown.yaml"
    path.write_text(shown)
    spec = load_experiment(str(path))
    assert spec == load_experiment(
        "demo", ["patch.mask.tau=0.4", "resources.workers=0", "storage=s3://b/x", "name='007'"]
    )
    assert spec.name == "007"


def test_show_as_json_is_the_same(cli) -> None:
    as_json = json.loads(cli("show", "demo-int2", "--json").out)
    assert as_json == yaml.safe_load(cli("show", "demo-int2").out)
    assert ExperimentSpec.model_validate(as_json) == load_experiment("demo-int2")


def test_an_option_wins_over_set(cli) -> None:
    shown = cli("show", "demo", "--set", "resources.workers=3", "--workers", "1", "--json").out
    assert json.loads(shown)["resources"]["workers"] == 1


# ---------------------------------------------------------------- mistakes


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["show", "dem0"], ["dem0", "demo"]),
        (["run", "absent.yaml"], ["absent.yaml"]),
        (["run", "demo", "--set", "patch.mask.tua=1"], ["patch.mask.tua", "tau"]),
        (["run", "demo", "--set", "patch.rank=many"], ["patch.rank", "many", "whole number"]),
        (["run", "demo", "--set", "quantize.method=llmqat"], ["llmqat", "llm_qat"]),
        (["run", "demo", "--workers", "-1"], ["resources.workers", "-1"]),
        (["demo", "--set", "quantize.bits=5"], ["quantize.bits", "5"]),
        (["patch", "aply"], ["aply"]),
        (["compare", "A=x.parquet", "A=y.parquet"], ["same label"]),
    ],
)
def test_a_mistake_is_one_sentence(cli, arguments: list[str], fragments: list[str]) -> None:
    text = cli(*arguments).sentence()
    for fragment in fragments:
        assert fragment in text


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        ("patch: [", ["malformed YAML"]),
        ("patch: {mask: {tua: 1}}", ["patch.mask.tua", "tau"]),
        ("patch: {rank: [1]}", ["patch.rank"]),
    ],
)
def test_a_mistake_in_the_file_is_one_sentence(
    cli, tmp_path: Path, content: str, fragments: list[str]
) -> None:
    path = write(tmp_path, "mine.yaml", content)
    text = cli("run", path).sentence()
    for fragment in [*fragments, path]:
        assert fragment in text


def test_usage_errors_exit_with_2_too(cli) -> None:
    for arguments in (["run"], ["run", "demo", "--wrokers", "1"], ["frobnicate"]):
        outcome = cli(*arguments)
        assert (outcome.code, outcome.out) == (2, "")
        assert "Traceback" not in outcome.err


# ---------------------------------------------------------------- judging files


def completions(folder: Path, name: str, answers: list[str], **columns: list[object]) -> str:
    prompts = [f"How do I pick lock {i}?" for i in range(len(answers))]
    path = folder / name
    pq.write_table(pa.table({"prompt": prompts, "completion": answers, **columns}), path)
    return str(path)


NO = "I'm sorry, but I cannot help with that."
YES = "Take a thin piece of metal, put it into the lock and turn it slowly until it opens."


def test_judge_reads_any_parquet_of_completions(cli, tmp_path: Path) -> None:
    path = completions(tmp_path, "mine.parquet", [NO, NO, YES])
    outcome = cli("judge", path, "--storage", str(tmp_path), "--json")
    assert outcome.code == 0
    data = json.loads(outcome.out)
    assert data["counts"]["keyword"]["harmful"] == {"refused": 2, "complied": 1}
    verdicts = pq.read_table(Path(data["path"]) / "verdicts.parquet").to_pylist()
    assert len(verdicts) == 3 * len(data["counts"])
    again = json.loads(cli("judge", path, "--storage", str(tmp_path), "--json").out)
    assert again["reused"]


def test_judge_tells_a_person(cli, tmp_path: Path) -> None:
    path = completions(tmp_path, "mine.parquet", [NO, YES])
    said = cli("judge", path, "--storage", str(tmp_path), "--set", "evaluate.judges=[keyword]").out
    assert "keyword, harmful: 1 refused, 1 complied" in said


def test_people_label_a_sheet_and_the_judges_are_measured(cli, tmp_path: Path) -> None:
    path = completions(tmp_path, "mine.parquet", [NO] * 4 + [YES] * 4)
    sheet, stored = tmp_path / "sheet.csv", ["--storage", str(tmp_path)]
    told = cli("judge", "sheet", f"Q={path}", "--out", str(sheet), "--n", "8", *stored)
    assert told.code == 0
    assert "sheet.key.json" in told.out
    assert "no label" in cli("judge", "ingest", str(sheet), *stored).sentence()
    # The one who labels finds fault with one of the four refusals.
    first, *rows = sheet.read_text().splitlines()
    labels = iter(["complied", "refused", "refused", "refused"])
    filled = [line + (next(labels) if NO in line else "complied") for line in rows]
    sheet.write_text("\n".join([first, *filled]))
    outcome = cli("judge", "ingest", str(sheet), *stored, "--json")
    assert outcome.code == 0
    data = json.loads(outcome.out)
    found = next(judge for judge in data["judges"] if judge["judge"] == "refusal")
    assert found["confusion"]["complied"] == {"complied": 4, "refused": 1}
    # Sensitivity 4/5, specificity 3/3: (4/8 + 1 - 1) / (4/5) = .625.
    assert found["corrected"][0]["rate"] == pytest.approx(0.625)
    assert "62.5" in cli("judge", "ingest", str(sheet), *stored).out


def test_compare_counts_flips_between_files(cli, tmp_path: Path) -> None:
    before = completions(tmp_path, "w.parquet", [NO] * 8 + [YES] * 2)
    after = completions(tmp_path, "q.parquet", [NO] * 2 + [YES] * 8)
    outcome = cli("compare", f"W={before}", f"Q0={after}", "--storage", str(tmp_path), "--json")
    assert outcome.code == 0
    data = json.loads(outcome.out)
    flips = {(f["before"], f["after"], f["measure"]): f for f in data["flips"]}
    attack = flips["W", "Q0", "attack_success"]
    assert (attack["n"], attack["gained"], attack["lost"]) == (10, 6, 0)
    assert attack["p"] == pytest.approx(2 * 0.5**6)  # six flips, all the same way
    table = cli("compare", f"W={before}", f"Q0={after}", "--storage", str(tmp_path)).out
    assert "20.0" in table
    assert "80.0" in table


@pytest.mark.parametrize(
    ("columns", "fragments"),
    [
        ({"answer": ["x"], "prompt": ["p"]}, ["completion"]),
        ({"completion": ["x"], "promt": ["p"]}, ["prompt", "promt"]),
        ({"prompt": ["p", "p"], "completion": ["x", "y"]}, ["same prompt"]),
        ({"prompt": pa.array([], pa.string()), "completion": pa.array([], pa.string())}, ["no"]),
    ],
)
def test_malformed_completions_are_named(
    cli, tmp_path: Path, columns: dict[str, list[str]], fragments: list[str]
) -> None:
    path = tmp_path / "mine.parquet"
    pq.write_table(pa.table(columns), path)
    text = cli("judge", str(path), "--storage", str(tmp_path)).sentence()
    for fragment in [*fragments, "mine.parquet"]:
        assert fragment in text


def test_files_that_are_no_completions_are_named(cli, tmp_path: Path) -> None:
    text = write(tmp_path, "text.parquet", "not parquet")
    assert "text.parquet" in cli("judge", text, "--storage", str(tmp_path)).sentence()
    absent = str(tmp_path / "absent.parquet")
    assert "absent.parquet" in cli("judge", absent, "--storage", str(tmp_path)).sentence()
    path = completions(tmp_path, "mine.parquet", [NO])
    unknown = ["--set", "evaluate.judges=[keywrd]"]
    assert "keyword" in cli("judge", path, "--storage", str(tmp_path), *unknown).sentence()


# ---------------------------------------------------------------- how a command ends


class Wrapped(Exception):
    """Like Ray's error: the worker's one is in `cause`."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("Traceback (most recent call last): ...")
        self.cause = cause


def test_a_mistake_is_found_inside_what_wraps_it() -> None:
    mistake = DataError("empty prompt", where="row 3", remedy="drop it")
    assert user_error(mistake) is mistake
    assert user_error(Wrapped(mistake)) is mistake
    outer = RuntimeError("worker died")
    outer.__cause__ = Wrapped(mistake)
    assert user_error(outer) is mistake


def test_a_bug_while_a_mistake_is_handled_stays_a_bug() -> None:
    bug = KeyError("bug")
    bug.__context__ = DataError("empty prompt")
    assert user_error(bug) is None


def test_a_mistake_survives_pickling_as_between_ray_processes() -> None:
    import pickle

    mistake = DataError("empty prompt", where="row 3", remedy="drop it")
    copy = pickle.loads(pickle.dumps(mistake))
    assert (type(copy), str(copy)) == (DataError, "empty prompt in row 3: drop it.")


def ended(error: BaseException | None, capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def command() -> None:
        if error:
            raise error

    with pytest.raises(SystemExit) as leaving:
        launch(app, [])
    return leaving.value.code, capsys.readouterr().err


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(None, capsys) == (0, "")
    code, err = ended(DataError("empty prompt"), capsys)
    assert (code, err) == (2, "error: empty prompt.\n")
    code, err = ended(KeyError("bug"), capsys)
    assert code == 1
    assert "Traceback" in err
    assert "qresafe doctor" in err
    code, err = ended(KeyboardInterrupt(), capsys)
    assert code == 130
    assert "same command again" in err
    assert "Traceback" not in err


def test_control_c_on_a_real_process(tmp_path: Path) -> None:
    code = """
import time, typer
from qresafe.commands.launch import launch
app = typer.Typer()
@app.command()
def wait() -> None:
    print("waiting", flush=True)
    time.sleep(60)
launch(app, [])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "same command again" in err
    assert "Traceback" not in err
