"""Whether stored bytes are still those that were written: a flipped bit or a cut-off end shows.

Small files carry their own seal: a Parquet file in its footer, a JSON file in its last key. Other
files have their size and hash in a manifest. Hashing reads everything, so a file is hashed when a
process first uses it; later the same process looks at its size and times alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upath import UPath

from qresafe.patience import patiently
from qresafe.redaction import redact

SEAL_KEY = "qresafe.seal"
_MARK = b"sha256-of-the-rest:"
BLANK = _MARK + b"0" * 64  # stands where the hash goes while it is computed
REMOTE_BYTES = 1 << 26  # larger files on an object store, which has checksums of its own, by size

_seen: dict[str, tuple[str, int, int, int]] = {}  # local path -> hash, and what it was seen with
_log = logging.getLogger("qresafe")


def tell(sentence: str) -> None:
    """Tell of damage that was found, and of what is done about it."""
    _log.warning("%s", sentence)


def sealed(data: bytes) -> bytes:
    """Return `data` with the hash of all else in place of its last `BLANK`."""
    place = data.rindex(BLANK)
    return b"".join((data[:place], _MARK, _hash_around(data, place), data[place + len(BLANK) :]))


def is_sealed(data: bytes) -> bool:
    """Return whether `data` has a seal at all; files of other programs have none."""
    return data.rfind(_MARK) >= 0


def seal_holds(data: bytes) -> bool:
    """Return whether `data` has a seal, and is what was sealed."""
    place = data.rfind(_MARK)
    if place < 0:
        return False
    return data[place + len(_MARK) : place + len(BLANK)] == _hash_around(data, place)


def _hash_around(data: bytes, place: int) -> bytes:
    view, digest = memoryview(data), hashlib.sha256()
    for piece in (view[:place], BLANK, view[place + len(BLANK) :]):
        digest.update(piece)
    return digest.hexdigest().encode()


def sealed_json(
    data: Mapping[str, Any], indent: int | None = None, *, verbatim: bool = False
) -> str:
    """Return JSON whose last key is the hash of the others.

    Secrets are taken out before the seal is set, since whatever is written as text loses them;
    `verbatim` keeps everything, for answers that are data.
    """
    text = json.dumps(data)
    plain = json.loads(text if verbatim else redact(text))
    return json.dumps(plain | {SEAL_KEY: _json_hash(plain)}, indent=indent)


def open_json(text: str) -> dict[str, Any]:
    """Return what `sealed_json` was given; JSON without a seal, of earlier versions, as it is.

    Raises:
        ValueError: It is no JSON object, or another one than was sealed.
    """
    data = json.loads(text)
    if not isinstance(data, dict):
        raise ValueError("no JSON object")
    given = data.pop(SEAL_KEY, None)
    if given is not None and given != _json_hash(data):
        raise ValueError("it is not as it was written")
    return data


def _json_hash(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def damage(path: UPath, digest: str, size: int | None) -> str:
    """Return what is wrong with a file: "missing", "cut off", "changed"; empty: nothing.

    Args:
        path: On any storage.
        digest: The sha256 that it should have.
        size: The bytes that it should have; None: not known.
    """
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        return "missing"
    if size is not None and found != size:
        return "cut off" if found < size else "changed"
    local = getattr(path, "protocol", "") in ("", "file", "local")
    if not local and size is not None and found > REMOTE_BYTES:
        return ""
    if local and _seen.get(str(path)) == (digest, *_times(path)):
        return ""
    if hash_file(path) != digest:
        return "changed"
    if local:
        _seen[str(path)] = (digest, *_times(path))
    return ""


def _times(path: UPath) -> tuple[int, int, int]:
    found = os.stat(str(path))
    return found.st_size, found.st_mtime_ns, found.st_ino


def hash_file(path: UPath | Path) -> str:
    """Return the sha256 of a file's bytes, read in pieces."""
    return patiently(lambda: _hash_file(path), path)


def _hash_file(path: UPath | Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()
