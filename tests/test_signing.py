"""Signed patches: openssl agrees, and whatever is changed, swapped or missing is refused."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qresafe import signing
from qresafe.cli import main
from qresafe.errors import DataError, ResourceError, SignatureError, UserError

Command = Callable[..., tuple[int, str, str]]
needs_openssl = pytest.mark.skipif(not shutil.which("openssl"), reason="needs the openssl program")


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    """A folder with my.key, other.key and a signed p.qpatch (any bytes)."""
    (tmp_path / "p.qpatch").write_bytes(bytes(range(256)) * 40)
    for name in ("my", "other"):
        signing.generate_key(tmp_path / f"{name}.key")
    signing.sign(tmp_path / "p.qpatch", tmp_path / "my.key")
    return tmp_path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `qresafe patch ...`; return its exit code, stdout and stderr."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as leaving:
            main(["patch", *map(str, words)])
        return (int(leaving.value.code or 0), *capsys.readouterr())

    return run


def test_a_signed_file_is_accepted(signed: Path) -> None:
    said = signing.verify(signed / "p.qpatch", signed / "my.key.pub")
    assert said.sha256 == hashlib.sha256(bytes(range(256)) * 40).hexdigest()


def openssl(*words: str | Path, given: bytes = b"") -> bytes:
    command = ["openssl", *map(str, words)]
    return subprocess.run(command, input=given, capture_output=True, check=True).stdout


def message(said: dict[str, str]) -> bytes:
    """Return what is signed, written out anew from the documentation of the format."""
    lines = ["qresafe qpatch-signature-1", "Ed25519", said["key"], said["sha256"], ""]
    return "\n".join(lines).encode()


@needs_openssl
def test_openssl_accepts_our_signature_and_names_the_same_key(signed: Path) -> None:
    said = json.loads((signed / "p.qpatch.sig").read_text())
    (signed / "message").write_bytes(message(said))
    (signed / "raw").write_bytes(base64.b64decode(said["signature"]))
    key = ("-pubin", "-inkey", signed / "my.key.pub")
    told = openssl(
        "pkeyutl", "-verify", *key, "-rawin", "-in", signed / "message", "-sigfile", signed / "raw"
    )
    assert b"Verified Successfully" in told
    der = openssl("pkey", "-pubin", "-in", signed / "my.key.pub", "-outform", "DER")
    assert said["key"] == hashlib.sha256(der).hexdigest()
    (signed / "message").write_bytes(message(said | {"sha256": "0" * 64}))
    with pytest.raises(subprocess.CalledProcessError):
        openssl(
            "pkeyutl",
            "-verify",
            *key,
            "-rawin",
            "-in",
            signed / "message",
            "-sigfile",
            signed / "raw",
        )


@needs_openssl
def test_we_accept_openssls_keys_and_signature(signed: Path) -> None:
    key = signed / "theirs.key"
    openssl("genpkey", "-algorithm", "ed25519", "-out", key)
    openssl("pkey", "-in", key, "-pubout", "-out", signed / "theirs.pub")
    der = openssl("pkey", "-in", key, "-pubout", "-outform", "DER")
    digest = hashlib.sha256((signed / "p.qpatch").read_bytes()).hexdigest()
    said = {"format": "qpatch-signature-1", "algorithm": "Ed25519", "sha256": digest}
    said["key"] = hashlib.sha256(der).hexdigest()
    (signed / "message").write_bytes(message(said))
    raw = openssl("pkeyutl", "-sign", "-inkey", key, "-rawin", "-in", signed / "message")
    said["signature"] = base64.b64encode(raw).decode()
    (signed / "p.qpatch.sig").write_text(json.dumps(said))
    assert signing.verify(signed / "p.qpatch", signed / "theirs.pub").key == said["key"]


def test_keys_are_for_their_owner_and_never_overwritten(tmp_path: Path) -> None:
    signing.generate_key(tmp_path / "my.key")
    assert stat.S_IMODE((tmp_path / "my.key").stat().st_mode) == 0o600
    for taken in ("my.key", "my.key.pub"):
        (tmp_path / "my.key").unlink(missing_ok=True)
        (tmp_path / taken).write_text("mine")
        with pytest.raises(ResourceError, match="exists"):
            signing.generate_key(tmp_path / "my.key")
        assert (tmp_path / taken).read_text() == "mine"


def test_a_key_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "my.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ResourceError):
        signing.generate_key(tmp_path / "my.key")
    assert not (tmp_path / "elsewhere").exists()


def test_a_passphrase_locks_the_key(signed: Path) -> None:
    signing.generate_key(signed / "locked.key", b"open sesame")
    assert b"ENCRYPTED" in (signed / "locked.key").read_bytes()
    signing.sign(signed / "p.qpatch", signed / "locked.key", b"open sesame")
    signing.verify(signed / "p.qpatch", signed / "locked.key.pub")
    for given, said in ((b"wrong", "wrong passphrase"), (None, "needs its passphrase")):
        with pytest.raises(DataError, match=said):
            signing.sign(signed / "p.qpatch", signed / "locked.key", given)
    with pytest.raises(DataError, match="needs no passphrase"):
        signing.sign(signed / "p.qpatch", signed / "my.key", b"open sesame")


def edit(**changes: Any) -> Callable[[Path], None]:
    """Return what changes fields of the signature."""

    def work(folder: Path) -> None:
        file = folder / "p.qpatch.sig"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return work


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "p.qpatch").read_bytes())
    data[5000] ^= 1
    (folder / "p.qpatch").write_bytes(data)


def flip_a_bit_and_rehash(folder: Path) -> None:
    flip_a_bit(folder)
    edit(sha256=hashlib.sha256((folder / "p.qpatch").read_bytes()).hexdigest())(folder)


def sign_by_another(folder: Path) -> None:
    signing.sign(folder / "p.qpatch", folder / "other.key")


def claim_my_key(folder: Path) -> None:
    mine = json.loads((folder / "p.qpatch.sig").read_text())["key"]
    sign_by_another(folder)
    edit(key=mine)(folder)


def unsigned(folder: Path) -> None:
    (folder / "p.qpatch.sig").unlink()


def sign_without_prefix(folder: Path) -> None:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key: Any = load_pem_private_key((folder / "my.key").read_bytes(), None)
    raw = key.sign(hashlib.sha256((folder / "p.qpatch").read_bytes()).hexdigest().encode())
    edit(signature=base64.b64encode(raw).decode())(folder)


def fill(data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "p.qpatch.sig").write_bytes(data) and None


ATTACKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "bytes": (flip_a_bit, "not the one that was signed"),
    "bytes and hash": (flip_a_bit_and_rehash, "not this key's"),
    "another key": (sign_by_another, "another key"),
    "another key that claims mine": (claim_my_key, "not this key's"),
    "no signature": (unsigned, "not signed"),
    "no prefix": (sign_without_prefix, "not this key's"),
    "another algorithm": (edit(algorithm="none"), "malformed"),
    "another format": (edit(format="qpatch-signature-2"), "malformed"),
    "more fields": (edit(trusted=True), "malformed"),
    "empty signature": (edit(signature=""), "not this key's"),
    "no base64": (edit(signature="!" * 88), "not this key's"),
    "a number": (edit(signature=3), "malformed"),
    "a path for a hash": (edit(sha256="../" * 22), "malformed"),
    "empty": (fill(b""), "malformed"),
    "no JSON": (fill(b"\xff\x00{"), "malformed"),
    "deep JSON": (fill(b"[" * 60_000), "malformed"),
    "huge": (fill(b" " * 70_000 + b"{}"), "malformed"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_bad_signature_is_refused(signed: Path, attack: str) -> None:
    work, said = ATTACKS[attack]
    work(signed)
    with pytest.raises(SignatureError, match=said) as failure:
        signing.verify(signed / "p.qpatch", signed / "my.key.pub")
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"no key", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", None],
)
def test_what_is_no_public_key_is_refused(signed: Path, content: bytes | None) -> None:
    key = signed / "my.key"  # the private one, by mistake
    if content is not None:
        key = signed / "x.pub"
        key.write_bytes(content)
    with pytest.raises(DataError, match="no public Ed25519 key"):
        signing.verify(signed / "p.qpatch", key)


def test_missing_files_are_named(signed: Path) -> None:
    for call in (
        lambda: signing.verify(signed / "absent", signed / "my.key.pub"),
        lambda: signing.verify(signed / "p.qpatch", signed / "absent"),
        lambda: signing.sign(signed / "p.qpatch", signed / "absent"),
        lambda: signing.sign(signed, signed / "my.key"),
    ):
        with pytest.raises(UserError, match="no such") as failure:
            call()
        assert str(signed) in str(failure.value)


def test_the_commands(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    patch, key = tmp_path / "p.qpatch", tmp_path / "k"
    patch.write_bytes(b"some bytes")
    monkeypatch.setenv("QRESAFE_KEY_PASSPHRASE", "open sesame")
    code, out, err = command("keygen", key, "--json")
    assert code == 0, err
    fingerprint = json.loads(out)["fingerprint"]
    (tmp_path / "phrase").write_text("open sesame\n")
    monkeypatch.delenv("QRESAFE_KEY_PASSPHRASE")
    assert command("sign", patch, "--key", key)[0] == 2
    code, out, err = command("sign", patch, "--key", key, "--passphrase-file", tmp_path / "phrase")
    assert (code, err) == (0, "")
    code, out, _ = command("verify", patch, "--public-key", f"{key}.pub")
    assert (code, out) == (0, f"signed_by: {fingerprint}\n")
    monkeypatch.setenv("QRESAFE_PUBLIC_KEY", f"{key}.pub")
    patch.write_bytes(b"other bytes")
    code, out, err = command("verify", patch)
    assert (code, out) == (2, "")
    assert "not the one that was signed" in err


def test_apply_and_revert_write_nothing_without_the_signature(
    signed: Path, command: Command
) -> None:
    out = signed / "out"
    for word in ("apply", "revert"):
        asked = (word, signed / "p.qpatch", signed, out)
        code, _, err = command(*asked, "--require-signature")
        assert (code, "no key to check" in err) == (2, True)
        code, _, err = command(*asked, "--public-key", signed / "other.key.pub")
        assert (code, "signed by another key" in err) == (2, True)
        # With the right key, it goes on to the patch itself, which is none here.
        code, _, err = command(*asked, "--public-key", signed / "my.key.pub")
        assert (code, "damaged patch" in err) == (2, True)
    assert not out.exists()
