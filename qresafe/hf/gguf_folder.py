"""A .gguf file as a model folder: beside the file, its config and tokenizer as transformers' own.

Everything else takes model folders. The file itself is linked, never copied.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

from qresafe.errors import CorruptArtifactError, ModelError
from qresafe.leftovers import aside
from qresafe.storage import cache_folder

MAGIC = b"GGUF"
METHOD = "gguf"
# Factors on the frequencies of rotary positions; transformers' table of tensors has none of them.
STRETCHED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")  # as llama.cpp names the parts of one model


def gguf_file(path: Path) -> Path | None:
    """Return the .gguf file that `path` is, or is the folder of; None if it is another model.

    Raises:
        ModelError: A folder holds several, or the file is one part of a model.
    """
    if path.suffix == ".gguf":
        if not path.is_file():
            return None
        refuse_split(path)
        return path
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    found = sorted(path.glob("*.gguf"))
    for file in found[:1]:
        refuse_split(file)
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:4])
        remedy = f"give the path of one of them ({names})"
        raise ModelError("several .gguf files", where=str(path), remedy=remedy)
    return found[0] if found else None


def refuse_split(file: Path) -> None:
    """Refuse a part of a model that is split into several files, by its name.

    Raises:
        ModelError: It is one; transformers reads whole files only.
    """
    part = PART.search(file.name)
    if part and int(part[1]) > 1:
        what = f"one of {int(part[1])} parts of a split GGUF model"
        remedy = "join them with llama-gguf-split --merge, and give the file that it makes"
        raise ModelError(what, where=str(file), remedy=remedy)


def is_unpacked(folder: Path) -> bool:
    """Return whether `folder` is one that `unpacked` made, or a copy of it."""
    config = folder / "config.json"
    return config.is_file() and f'"{METHOD}"' in config.read_text()


def check_gguf(file: Path) -> None:
    """Read a file's header and table of tensors, and check that all of them are there.

    Raises:
        CorruptArtifactError: It is no GGUF file, of another version, or truncated.
        ModelError: Its positions are stretched (Llama 3.1, Phi 3), which transformers drops.
    """
    from gguf import GGUFReader

    remedy = "copy or download it again"
    with file.open("rb") as reader:
        if reader.read(4) != MAGIC:
            raise CorruptArtifactError("not a GGUF file", where=str(file), remedy=remedy)
    try:
        tensors = GGUFReader(file).tensors
    except Exception as error:  # numpy, struct and the package's own, by where it is cut
        what = f"damaged GGUF file ({' '.join(str(error).split())[:120]})"
        raise CorruptArtifactError(what, where=str(file), remedy=remedy) from None
    stretched = [one.name for one in tensors if one.name in STRETCHED and (one.data != 1).any()]
    if stretched:
        what = f"transformers leaves out how this model stretches its positions ({stretched[0]})"
        remedy = "use a checkpoint in another format: it would answer unlike the file does"
        raise ModelError(what, where=str(file), remedy=remedy)


def unpacked(file: Path) -> Path:
    """Return a model folder of a .gguf file, made once, in the cache.

    Raises:
        ModelError: transformers does not know the architecture.
        CorruptArtifactError: The file is damaged.
    """
    file = file.absolute()
    content = file.resolve()  # the hub's cache names it by its hash alone, without .gguf
    check_gguf(file)
    state = file.stat()
    identity = f"{content} {state.st_size} {state.st_mtime_ns}"
    target = cache_folder() / f"gguf-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    if target.is_dir():
        return target
    scratch = target.with_name(aside(target.name))
    scratch.mkdir(parents=True)
    try:
        (scratch / file.name).symlink_to(content)
        _write_config(scratch, file)
        _write_tokenizer(scratch, file)
        scratch.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _write_config(folder: Path, file: Path) -> None:
    config = gguf_config(file).to_dict()
    # What is decoded is float32; the key lets everything recognise the folder by its config.
    config |= {"dtype": "float32", "quantization_config": {"quant_method": METHOD}}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))


def gguf_config(file: Path) -> Any:
    """Return transformers' config of a .gguf file.

    Raises:
        ModelError: transformers does not know the architecture, or the file lacks metadata.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # whatever an unforeseen set of metadata leads to
        text = " ".join(str(error).split())[:200]
        remedy = "use a checkpoint in another format"
        raise ModelError(
            f"transformers cannot read this GGUF file ({text})", where=str(file), remedy=remedy
        ) from None


def _write_tokenizer(folder: Path, file: Path) -> None:
    """Write the file's own tokenizer, if it has one that transformers can make."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception:  # a file without vocabulary; W's tokenizer may stand in
        return
    tokenizer.save_pretrained(folder)
