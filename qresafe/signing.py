"""Signatures of patch files: Ed25519 over a hash, in a small JSON file beside the patch.

`P.qpatch.sig` names its algorithm, the key and the sha256 of the patch, and signs all three behind
a prefix of its own, so that no signature made for something else can pass for one of a patch. Keys
are PEM files as openssl writes and reads them.
"""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path
from typing import Literal

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qresafe.artifacts import hash_file, output_errors, write_bytes
from qresafe.errors import DataError, ResourceError, SignatureError

FORMAT: Literal["qpatch-signature-1"] = "qpatch-signature-1"
SUFFIX, PUBLIC = ".sig", ".pub"
LONGEST = 1 << 16  # bytes of a key or signature file; a real one has some hundreds
_HEX64 = r"^[0-9a-f]{64}$"


class Signature(BaseModel):
    """What a signature file holds.

    Attributes:
        key: Fingerprint of the key that signed.
        sha256: Of the patch file.
        signature: 64 bytes over `message`, in base64.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["qpatch-signature-1"] = FORMAT
    algorithm: Literal["Ed25519"] = "Ed25519"
    key: str = Field(pattern=_HEX64)
    sha256: str = Field(pattern=_HEX64)
    signature: str = Field(max_length=100)

    def message(self) -> bytes:
        """Return the bytes that are signed."""
        return f"qresafe {self.format}\n{self.algorithm}\n{self.key}\n{self.sha256}\n".encode()


def generate_key(target: Path, passphrase: bytes | None = None) -> str:
    """Write a new private key, for its owner's eyes alone, and beside it `target`.pub.

    Args:
        target: The private key's file; it must not exist.
        passphrase: Encrypts the private key.

    Returns:
        The key's fingerprint.

    Raises:
        ResourceError: A file exists already, or cannot be written.
    """
    public = _beside(target, PUBLIC)
    for file in (target, public):
        if file.exists():
            raise ResourceError("the file exists", where=str(file), remedy="give another name")
    key = Ed25519PrivateKey.generate()
    locked: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        locked = serialization.BestAvailableEncryption(passphrase)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked)
    with output_errors(target):
        # Never readable by others, not even for a moment; and never through somebody's link.
        made = os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(made, "wb") as out:
            out.write(pem)
        write_bytes(public, _pem(key.public_key()))
    return fingerprint(key.public_key())


def sign(patch: Path, key_file: Path, passphrase: bytes | None = None) -> tuple[Path, Signature]:
    """Write the signature of a file beside it; return where, and what it says.

    Raises:
        DataError: There is no such file or key, or the passphrase is wrong.
        ResourceError: The signature cannot be written.
    """
    digest = _sha256(patch)
    key = _private_key(key_file, passphrase)
    unsigned = Signature(key=fingerprint(key.public_key()), sha256=digest, signature="")
    signed = base64.b64encode(key.sign(unsigned.message())).decode()
    made = unsigned.model_copy(update={"signature": signed})
    target = _beside(patch, SUFFIX)
    with output_errors(target):
        write_bytes(target, made.model_dump_json(indent=1).encode() + b"\n")
    return target, made


def verify(patch: Path, public_key: Path) -> Signature:
    """Check that the holder of a key signed exactly this file.

    Args:
        patch: The file; its signature lies beside it.
        public_key: The key that is trusted. It must come from somewhere else than the patch.

    Raises:
        SignatureError: The signature is missing, malformed, of other bytes or of another key.
        DataError: There is no such file or key.
    """
    digest, key = _sha256(patch), _public_key(public_key)
    said = _read_signature(_beside(patch, SUFFIX), patch)
    if said.key != fingerprint(key):
        remedy = "get the signer's own public key, or do not use this patch"
        raise SignatureError(
            f"signed by another key ({said.key[:16]}...)", where=str(patch), remedy=remedy
        )
    try:
        key.verify(base64.b64decode(said.signature, validate=True), said.message())
    except (InvalidSignature, ValueError):
        raise _bad("the signature is not this key's", patch) from None
    if said.sha256 != digest:
        raise _bad("the file is not the one that was signed", patch)
    return said


def fingerprint(key: Ed25519PublicKey) -> str:
    """Return the sha256 of a public key in DER, as `openssl pkey -pubin -outform DER` writes it."""
    der = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(der).hexdigest()


def _read_signature(file: Path, patch: Path) -> Signature:
    if not file.is_file():
        remedy = f"fetch {file.name}, too, or do without --public-key and --require-signature"
        raise SignatureError("the patch is not signed", where=str(patch), remedy=remedy)
    try:
        return Signature.model_validate_json(_read(file))
    except (ValidationError, RecursionError):
        raise _bad(f"{file.name} is malformed", patch) from None


def _private_key(file: Path, passphrase: bytes | None) -> Ed25519PrivateKey:
    remedy = "give one that `qresafe patch keygen` made"
    try:
        key = serialization.load_pem_private_key(_read(file), passphrase or None)
    except TypeError:  # a passphrase is missing, or given for a key that has none
        what = "the key needs no passphrase" if passphrase else "the key needs its passphrase"
        remedy = "give --passphrase-file, or set QRESAFE_KEY_PASSPHRASE"
        raise DataError(what, where=str(file), remedy=remedy) from None
    except (ValueError, UnsupportedAlgorithm):
        what = "no private key, or a wrong passphrase"
        raise DataError(what, where=str(file), remedy=remedy) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise DataError("the key is no Ed25519 key", where=str(file), remedy=remedy)
    return key


def _public_key(file: Path) -> Ed25519PublicKey:
    try:
        key = serialization.load_pem_public_key(_read(file))
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        remedy = "give the *.pub file that `qresafe patch keygen` made"
        raise DataError("no public Ed25519 key", where=str(file), remedy=remedy)
    return key


def _pem(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _read(file: Path) -> bytes:
    """Return a small file's bytes."""
    if not file.is_file():
        raise DataError("no such file", where=str(file), remedy="give a file that exists")
    with file.open("rb") as reader:
        data = reader.read(LONGEST + 1)
    return data if len(data) <= LONGEST else b""


def _sha256(patch: Path) -> str:
    if not patch.is_file():
        raise DataError("no such patch file", where=str(patch), remedy="give a *.qpatch file")
    return hash_file(patch)


def _beside(file: Path, suffix: str) -> Path:
    return file.with_name(file.name + suffix)


def _bad(what: str, patch: Path) -> SignatureError:
    remedy = "do not use this patch; fetch it again with its signature"
    return SignatureError(what, where=str(patch), remedy=remedy)
