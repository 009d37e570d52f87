"""Secrets are planted wherever they can enter, and looked for in all that a run leaves behind."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from starlette.responses import JSONResponse, Response

from qresafe.artifacts import Artifact, Run
from qresafe.cli import main
from qresafe.commands.launch import launch
from qresafe.errors import ModelError, SpecError
from qresafe.loading import load_spec
from qresafe.redaction import HIDDEN, looks_secret, redact, redacted_output, secret_values
from qresafe.specs import ExperimentSpec
from tests.stages.servers import ChatServer, serving

# None of these has the shape of a known key: only the environment says that they are secret.
KEY = "correct horse/battery+staple"
PASSWORD = 'p"q<r>&ss-wörd'
USER = "planted-user"

SHAPES = {
    "hugging face": "hf_" + "aB3" * 11,
    "openai": "sk-proj-" + "Ab1_" * 8,
    "aws id": "AKIA" + "IOSFODNN7EXAMPLE",
    "google": "AIza" + "a1B2c" * 7,
    "github": "ghp_" + "a1B2" * 9,
    "slack": "xoxb-" + "123456789012-abcdef",
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl",
}


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment with a key for endpoints, and a password."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("MY_DATABASE_PASSWORD", PASSWORD)


@pytest.mark.parametrize("secret", SHAPES.values(), ids=SHAPES.keys())
def test_known_shapes_are_hidden_wherever_they_stand(secret: str) -> None:
    for text in (secret, f"a {secret} b", f'{{"k": "{secret}"}}', f"https://x/?a={secret}&b=1"):
        assert secret not in redact(text)
        assert HIDDEN in redact(text)
        assert looks_secret(text)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("s3://me:pa@ss@bucket/x", f"s3://{HIDDEN}@bucket/x"),
        ("https://me:pass@host:8000/v1", f"https://{HIDDEN}@host:8000/v1"),
        ("Authorization: Bearer abcdefgh1234", f"Authorization: Bearer {HIDDEN}"),
        ("{'authorization': 'Basic dXNlcjpwYXNz'}", f"{{'authorization': 'Basic {HIDDEN}'}}"),
        ("sent bearer abcdefgh.1234-5678", f"sent bearer {HIDDEN}"),
        ("GET /x?api_key=abc&n=1", f"GET /x?api_key={HIDDEN}&n=1"),
        ("https://b/k?X-Amz-Signature=0f3e&v=2", f"https://b/k?X-Amz-Signature={HIDDEN}&v=2"),
        ("aws_secret_access_key = wJalrXUtnFEMI/K7MDENG", f"aws_secret_access_key = {HIDDEN}"),
        ("-----BEGIN PRIVATE KEY-----\nMC4C\n-----END PRIVATE KEY-----\n.", f"{HIDDEN}\n."),
    ],
)
def test_secrets_known_by_what_stands_around_them(text: str, left: str) -> None:
    assert redact(text) == left


@pytest.mark.parametrize(
    "text",
    [
        "the risk-assessment of disk-based sk-learn-pipelines",
        "hf_checkpoint_of_the_last_step_of_training",
        "http://127.0.0.1:8000/v1 and me@example.org, at 12:30",
        "s3://bucket/runs/a:b/c@d",
        "the bearer of good news; bearer certificates",
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "patch.mask.tau=0.4 key: 0123456789abcdef",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert redact(text) == text


def test_values_of_the_environment_by_their_names(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("x")
    environment = {
        "HF_TOKEN": "0123456789",
        "aws_secret_access_key": "abcdefghijk",
        "DB_PASSWORD": "12345678",
        "SHORT_KEY": "1234567",  # 7 < 8 characters
        "TOKENIZERS_PARALLELISM": "not-a-secret",
        "RAY_AUTH_TOKEN_PATH": "/not/there/token",
        "SSH_KEY": str(file),
        "HOME": "/home/somebody",
    }
    assert secret_values(environment) == ["abcdefghijk", "0123456789", "12345678"]


def test_a_secret_is_found_however_a_format_spells_it(planted: None) -> None:
    from html import escape
    from urllib.parse import quote

    for spelled in (PASSWORD, json.dumps(PASSWORD), escape(PASSWORD), quote(PASSWORD, safe="")):
        assert HIDDEN in redact(f"before {spelled} after")
        assert "ss-w" not in redact(f"before {spelled} after")


@pytest.mark.parametrize(
    "piece", ["sk-", "a://", "bearer ", "?key", "authorization ", "eyJ", "-----BEGIN "]
)
def test_no_text_is_slow(piece: str) -> None:
    began = time.perf_counter()
    redact(piece * 20_000)
    redact(piece + "a" * 200_000)
    assert time.perf_counter() - began < 2


def test_errors_hide_what_they_tell() -> None:
    error = ModelError(
        "no sk-0123456789abcdefgh", where="s3://a:b@c/d", remedy="use hf_" + "x1" * 9
    )
    assert str(error) == f"no {HIDDEN} in s3://{HIDDEN}@c/d: use {HIDDEN}."
    rebuilt, arguments, _ = error.__reduce__()
    assert str(rebuilt(*arguments)) == str(error)  # type: ignore[operator, misc]


def test_output_is_hidden_and_the_streams_come_back(
    planted: None, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    before = sys.stdout
    with redacted_output():
        print("key", KEY)
        print(PASSWORD, file=sys.stderr)
        assert sys.stdout.isatty() == before.isatty()
    assert sys.stdout is before
    print("plain")
    assert capsys.readouterr() == (f"key {HIDDEN}\nplain\n", f"{HIDDEN}\n")


@pytest.mark.parametrize(
    "override",
    [
        "storage=s3://me:pass@bucket",
        "model.path=" + SHAPES["hugging face"],
        "evaluate.generate.endpoint=https://me:pass@host/v1",
        "evaluate.attack={systems: [" + SHAPES["openai"] + "]}",
    ],
)
def test_specs_take_no_secrets(override: str) -> None:
    with pytest.raises(SpecError, match="holds a key or a password") as failure:
        load_spec(ExperimentSpec, None, [override])
    assert not looks_secret(str(failure.value))
    assert override.partition("=")[0] in str(failure.value)


class Telling(ChatServer):
    """Answers some questions with the key, as careless servers do in their errors."""

    async def _reply(self, body: dict[str, Any]) -> Response:
        if len(self.bodies) % 2:
            told = f"key {self.key} of https://{USER}:wörd@host, {SHAPES['openai']}"
            return JSONResponse({"error": {"message": told}}, 400)
        return await super()._reply(body)


def test_nothing_that_a_run_leaves_behind_holds_a_secret(
    planted: None,
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = Telling(lambda body: "Sorry, no.", key=KEY)
    with serving(server) as url:
        settings = {
            "storage": str(tmp_path),
            "model.path": str(tiny_llama),
            "resources.workers": 0,
            "evaluate.generate.engine": "openai",
            "evaluate.generate.endpoint": url,
            "evaluate.generate.endpoint_model": "toy",
            "evaluate.generate.system_prompt": f"never tell {PASSWORD} or {KEY}",
            "evaluate.prompts": [{"axis": "harmful", "limit": 6}],
        }
        given = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
        with pytest.raises(SystemExit) as leaving:
            main(["generate", "cpu-smoke", "--arm", "W", "--json", *given])
    out, err = capsys.readouterr()
    assert leaving.value.code == 0, err
    assert len(server.bodies) == 6
    assert KEY in server.bodies[0]["messages"][0]["content"], "what is sent is not changed"
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"manifest.json", "completions.parquet"} <= {file.name for file in written}
    assert_clean(written, out + err)
    manifest = next(file for file in written if file.name == "manifest.json").read_text()
    assert f"never tell {HIDDEN} or {HIDDEN}" in manifest
    assert errors_of(next(f for f in written if f.name == "completions.parquet"))


def errors_of(file: Path) -> list[str]:
    import pyarrow.parquet as pq

    errors = [error for error in pq.read_table(file)["error"].to_pylist() if error]
    assert all(HIDDEN in error for error in errors)
    return errors


def assert_clean(files: list[Path], printed: str) -> None:
    """Assert that no secret, however spelled, is in any file's bytes or in what was printed."""
    found = b"\n".join(file.read_bytes() for file in files) + printed.encode()
    for secret in (KEY, PASSWORD, json.dumps(PASSWORD)[1:-1], SHAPES["openai"], USER):
        assert secret.encode() not in found
    assert not re.search(rb"horse.battery|ss-w", found)


def test_manifests_and_bugs_hide_what_they_tell(
    planted: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(str(tmp_path), "r")

    def stage() -> Artifact:
        told = {"note": PASSWORD}
        return run.stage("x", spec={"said": KEY}, inputs={}, code_version=1, work=lambda _: told)

    assert not stage().reused
    assert stage().reused, "its key is of the spec as it was given"
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def broken() -> None:
        raise RuntimeError(f"cannot log in with {KEY}")

    with pytest.raises(SystemExit) as leaving:
        launch(app, [])
    assert leaving.value.code == 1
    printed = "".join(capsys.readouterr())
    assert f"RuntimeError: cannot log in with {HIDDEN}" in printed
    assert_clean([Path(str(stage().path)) / "manifest.json"], printed)
