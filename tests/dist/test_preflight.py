"""The doctor: every check can fail, says what to do, and never shows a secret."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from qresafe.cli import main
from qresafe.dist import preflight, preflight_ray
from qresafe.dist.preflight import GIB
from qresafe.dist.runtime import _not_joined


def test_the_quick_doctor_finds_this_environment_sound(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["doctor", "--no-ray", "--storage", str(tmp_path), "--json"])
    found = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert [c for c in found.values() if c["status"] == "fail"] == []
    assert leaving.value.code == 0
    assert set(found) >= {"python", "packages", "datasets", "gpus", "memory", "disk", "storage"}


def test_a_failed_check_fails_the_doctor(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(SystemExit) as leaving:
        main(["doctor", "--no-ray", "--storage", str(blocked / "sub")])
    assert leaving.value.code == 1
    out = capsys.readouterr().out
    assert "fail storage" in out
    assert "-> give a --storage" in out


def test_versions_that_differ_from_the_pins_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pins = [preflight.Requirement(text) for text in ("torch==2.13.0", "peft==0.0.1")]
    monkeypatch.setattr(preflight, "_pins", lambda: iter(pins))
    check = preflight.package_versions()
    assert check.status == "warn"
    assert "peft" in check.detail
    assert "torch" not in check.detail  # the CPU build's "+cpu" is the same version
    monkeypatch.setattr(preflight, "_pins", lambda: iter([preflight.Requirement("absent-x==1")]))
    assert preflight.package_versions().status == "fail"


def test_the_pins_are_known_without_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    locked = {pin.name: str(pin.specifier) for pin in preflight._pins()}
    monkeypatch.setattr(preflight.qresafe, "__file__", "/nowhere/qresafe/__init__.py")
    required = {pin.name: str(pin.specifier) for pin in preflight._pins()}
    assert "torch" in required
    lower = {name.lower().replace("_", "-"): pin for name, pin in locked.items()}
    assert {lower[name.lower().replace("_", "-")] for name in required if name == "torch"} == {
        required["torch"]
    }


def test_a_shadowed_datasets_is_found(tmp_path: Path) -> None:
    (tmp_path / "datasets.py").write_text("")
    code = "from qresafe.dist.preflight import datasets_origin as d; print(d().status, d().detail)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith("fail the library is shadowed")
    assert str(tmp_path) in found.stdout
    assert preflight.datasets_origin().status == "ok"


def test_gpus_that_are_not_there_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    check = preflight.gpus(1000)
    assert check.status == "warn"
    assert "1000 asked for" in check.detail


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("free", "status"), [(0.5, "fail"), (3, "warn"), (50, "ok")])
def test_disk(monkeypatch: pytest.MonkeyPatch, free: float, status: str, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, int(free * GIB)))
    check = preflight.disk(str(tmp_path / "not" / "there" / "yet"))
    assert (check.status, bool(check.remedy)) == (status, status != "ok")


def test_memory_counts_the_container_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qresafe.memory.container_room", lambda: 2 * GIB)
    check = preflight.memory()
    assert check.status == "warn"
    assert "2.0 GiB free" in check.detail


def test_a_hub_token_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    check = preflight.hub_token()
    assert check.detail == "present"
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "HF_TOKEN" in preflight.hub_token().remedy


def test_the_ray_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    token = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert preflight_ray.authentication().status == "fail"
    token.write_text("secret-token")
    token.chmod(0o644)
    assert preflight_ray.authentication().remedy == f"chmod 600 {token}"
    token.chmod(0o600)
    check = preflight_ray.authentication()
    assert check.status == "ok"
    assert "secret-token" not in check.detail
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert preflight_ray.authentication().status == "warn"


def test_the_upload_is_what_ray_would_pack(tmp_path: Path) -> None:
    (tmp_path / ".rayignore").write_text("/ignored/\n")
    for name, size in (("ignored/big", 300), ("kept/small", 1)):
        path = tmp_path / name
        path.parent.mkdir()
        with open(path, "wb") as file:
            file.truncate(size * 2**20)  # sparse: takes no disk
    assert preflight_ray.upload_size(tmp_path).status == "ok"
    with open(tmp_path / "kept" / "half", "wb") as file:
        file.truncate(60 * 2**20)
    assert preflight_ray.upload_size(tmp_path).status == "warn"
    with open(tmp_path / "kept" / "large", "wb") as file:
        file.truncate(50 * 2**20)
    check = preflight_ray.upload_size(tmp_path)
    assert check.status == "fail"
    assert "largest: kept/half, kept/large" in check.detail


def test_this_project_is_small_enough_to_upload() -> None:
    check = preflight_ray.upload_size(Path(__file__).parents[2])
    assert check.status == "ok", check.detail


def test_a_wrong_token_is_told_though_ray_names_it_in_an_inner_error_only() -> None:
    try:
        try:
            raise RuntimeError("RPC error: InvalidAuthToken: Authentication token is missing")
        except RuntimeError as inner:
            raise ConnectionError("Failed to connect to Ray cluster at h:1") from inner
    except ConnectionError as error:
        told = str(_not_joined("h:1", error))
        assert "asks for another token" in told
        assert "RAY_AUTH_MODE=token" in told
    told = str(_not_joined("h:1", ConnectionError("Failed to connect")))
    assert "cannot join the Ray cluster (Failed to connect) in h:1: start it" in told
