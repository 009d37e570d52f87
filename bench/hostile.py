"""Hostile files and settings by the thousand: each ends in a result or in one clear sentence.

`make bench-hostile` writes docs/reliability/hostile.md. An input that ends in anything else (an
exception, a message of several lines, more than 10 s, more than 2 GiB) is a defect; it is kept in
.bench/hostile, and the command ends with exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import yaml

from bench import hostile_inputs as inputs
from bench.hostile_page import Row, write_page
from qresafe.errors import UserError
from qresafe.presets import load_experiment

SECONDS, ROOM, LONGEST = 10.0, 2 << 30, 2000
KEPT = Path(".bench/hostile")

Make = Callable[[random.Random], bytes]
Feed = Callable[[bytes], object]


@dataclass(frozen=True)
class Kind:
    """One kind of input.

    Attributes:
        name: What it is.
        fed: What it is given to.
        cases: How many the whole bench makes.
        make: A case, by a seed.
        feed: Gives a case to the program; what it returns does not matter.
    """

    name: str
    fed: str
    cases: int
    make: Make
    feed: Feed


@dataclass
class Outcome:
    """What became of one kind's cases."""

    kind: Kind
    cases: int
    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0
    defects: dict[str, bytes] = field(default_factory=dict)  # what happened -> the first case

    def row(self) -> Row:
        """Return the line of the page."""
        return Row(
            self.kind.name, self.kind.fed, self.cases, self.accepted, self.refused, self.slowest
        )


class _TooLong(BaseException):
    """Not an `Exception`: no handler of the program's may take it for its own."""


def measure(kind: Kind, cases: int, seed: int = 0) -> Outcome:
    """Feed `cases` cases of a kind and count how they end."""
    outcome = Outcome(kind, cases)
    with _limits(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(cases):
            data = kind.make(random.Random(f"{kind.name} {seed} {number}"))
            began = time.process_time()
            _try(kind, data, outcome)
            spent = time.process_time() - began
            outcome.slowest = max(outcome.slowest, spent)
            if spent > SECONDS:
                outcome.defects.setdefault(f"takes more than {SECONDS:.0f} s", data)
    return outcome


def _try(kind: Kind, data: bytes, outcome: Outcome) -> None:
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        kind.feed(data)
        outcome.accepted += 1
    except UserError as error:
        text = str(error)
        if "\n" in text or len(text) > LONGEST:
            outcome.defects.setdefault(f"a message that is no sentence: {text[:200]!r}", data)
        else:
            outcome.refused += 1
    except _TooLong:
        outcome.defects.setdefault(f"takes more than {SECONDS:.0f} s", data)
    except Exception as error:
        place, text = _place(error), " ".join(str(error).split())[:120]
        if not any(known.startswith(place) for known in outcome.defects):
            outcome.defects[f"{place}: {text}"] = data
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _place(error: Exception) -> str:
    """Return an error's type, and the last line of the program's own that it came through."""
    own = [f for f in traceback.extract_tb(error.__traceback__) if "/qresafe/" in f.filename]
    where = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "?"
    return f"{type(error).__name__} at {where}"


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Let no case take more than `ROOM` bytes beyond what is taken now, nor `SECONDS` of CPU."""

    def too_long(*_: object) -> None:
        raise _TooLong

    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)


# ---------------------------------------------------------------- what is fed to what


def kinds(folder: Path, model: Path) -> list[Kind]:
    """Return all kinds.

    Args:
        folder: An empty one to work in.
        model: A small model folder with a chat template.
    """
    return [*_specs(folder), *_tables(folder), _templates(model), *_models(folder, model)]


def _specs(folder: Path) -> Iterator[Kind]:
    from qresafe.loading import load_spec
    from qresafe.specs import ExperimentSpec

    spec = load_experiment("demo").model_dump(mode="json")
    text = yaml.safe_dump(spec)

    def load(data: bytes) -> None:
        load_spec(ExperimentSpec, _written(folder / "spec.yaml", data))

    def override(data: bytes) -> None:
        load_spec(ExperimentSpec, None, [data.decode("utf-8", "surrogatepass")])

    def set_one(chance: random.Random) -> bytes:
        return inputs.setting(chance, spec).encode("utf-8", "surrogatepass")

    damaged = partial(inputs.damaged_text, text=text, words=inputs.YAML_WORDS)
    yield Kind("YAML spec, damaged", "load_spec", 1500, damaged, load)
    yield Kind(
        "YAML spec, odd values", "load_spec", 1500, lambda c: inputs.twisted_yaml(c, spec), load
    )
    yield Kind("--set KEY=VALUE", "load_spec", 1500, set_one, override)


def _tables(folder: Path) -> Iterator[Kind]:
    import pyarrow as pa
    from pyarrow import parquet

    from qresafe.benchmarks.base import load
    from qresafe.specs import PromptSetSpec

    rows = [
        {"prompt": f"Tell me, {i}", "target": "Sure", "category": "c", "id": i} for i in range(9)
    ]
    parquet.write_table(pa.Table.from_pylist(rows), folder / "sound.parquet")
    sound = (folder / "sound.parquet").read_bytes()
    as_csv = "prompt,target,category\n" + '"Tell me, ""x""",Sure,c\n' * 9
    as_jsonl = "".join(json.dumps(row) + "\n" for row in rows)

    def read(data: bytes, name: str) -> None:
        path = str(_written(folder / name, data))
        load(PromptSetSpec(benchmark="prompts", path=path))

    def lines(chance: random.Random) -> bytes:
        return b"\n".join(inputs.twisted_json(chance, row) for row in rows[: chance.randint(1, 4)])

    csv = partial(inputs.damaged_text, text=as_csv, words=inputs.TABLE_WORDS)
    jsonl = partial(inputs.damaged_text, text=as_jsonl, words=inputs.JSON_WORDS)
    fed = "benchmarks.load"
    yield Kind("CSV", fed, 1000, csv, partial(read, name="x.csv"))
    yield Kind("JSONL, damaged", fed, 800, jsonl, partial(read, name="x.jsonl"))
    yield Kind("JSONL, odd values", fed, 800, lines, partial(read, name="x.jsonl"))
    yield Kind(
        "JSON", fed, 500, lambda c: inputs.twisted_json(c, rows), partial(read, name="x.json")
    )
    parquets = partial(inputs.damaged, data=sound)
    yield Kind("Parquet", fed, 1000, parquets, partial(read, name="x.parquet"))


def _templates(model: Path) -> Kind:
    from qresafe.hf.chat import prompt_ids
    from qresafe.hf.models import load_tokenizer
    from qresafe.hf.template_probe import check_template

    tokenizer = load_tokenizer(model)
    sound = tokenizer.chat_template

    def render(data: bytes) -> None:
        tokenizer.chat_template = data.decode("utf-8", "replace")
        check_template(tokenizer, "a model")
        prompt_ids(tokenizer, "Hello", "Be kind.")

    make = partial(inputs.damaged_text, text=sound, words=inputs.TEMPLATE_WORDS)
    return Kind("Chat template", "check_template, prompt_ids", 400, make, render)


def _models(folder: Path, model: Path) -> Iterator[Kind]:
    from qresafe.hf.checkpoint import QuantizedCheckpoint
    from qresafe.hf.models import check_folder, load_config
    from qresafe.quantize_specs import RtnSpec
    from qresafe.quantizers.rtn import quantize

    quantize(model, folder, RtnSpec(bits=4, group_size=32))
    q0 = (folder / "checkpoint").rename(folder / "q0")
    yield from _patches(folder, q0)
    spoiled = Path(shutil.copytree(q0, folder / "spoiled"))
    weights, config = spoiled / "model.safetensors", spoiled / "config.json"
    sound, told = weights.read_bytes(), json.loads(config.read_text())
    head = 8 + int.from_bytes(sound[:8], "little")
    table = json.loads(sound[8:head])

    def read(data: bytes) -> None:
        weights.write_bytes(data)
        try:
            checkpoint = QuantizedCheckpoint.open(spoiled)
            for name in checkpoint.names:
                checkpoint.read(name)
        finally:
            weights.write_bytes(sound)

    def configure(data: bytes) -> None:
        config.write_bytes(data)
        try:
            check_folder(spoiled)
            load_config(spoiled)
            QuantizedCheckpoint.open(spoiled)
        finally:
            config.write_text(json.dumps(told))

    def headed(chance: random.Random) -> bytes:
        made = inputs.twisted_json(chance, table)
        return len(made).to_bytes(8, "little") + made + sound[head:]

    damaged = partial(inputs.damaged_head, data=sound, head=head)
    fed = "QuantizedCheckpoint"
    yield Kind("safetensors header, damaged", fed, 500, damaged, read)
    yield Kind("safetensors header, odd values", fed, 500, headed, read)
    make = partial(inputs.twisted_json, data=told)
    yield Kind("config.json", "load_config, QuantizedCheckpoint", 500, make, configure)
    yield _index(folder, q0)
    yield _gguf(folder)


def _index(folder: Path, q0: Path) -> Kind:
    from qresafe.hf.models import check_folder

    sharded = Path(shutil.copytree(q0, folder / "sharded"))
    (sharded / "model.safetensors").rename(sharded / "model-00001-of-00001.safetensors")
    file = sharded / "model.safetensors.index.json"
    names = [f"model.layers.{i}.weight" for i in range(4)]
    sound = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}

    def check(data: bytes) -> None:
        file.write_bytes(data)
        check_folder(sharded)

    make = partial(inputs.twisted_json, data=sound)
    return Kind("model.safetensors.index.json", "check_folder", 500, make, check)


def _gguf(folder: Path) -> Kind:
    import gguf
    import numpy as np

    from qresafe.hf.gguf_folder import check_gguf

    file = folder / "sound.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    for name in ("token_embd.weight", "output.weight"):
        writer.add_tensor(name, np.zeros((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    make = partial(inputs.damaged_head, data=file.read_bytes(), head=400)
    return Kind(
        "GGUF", "check_gguf", 500, make, lambda d: check_gguf(_written(folder / "x.gguf", d))
    )


def _patches(folder: Path, q0: Path) -> Iterator[Kind]:
    from qresafe import signing
    from qresafe.hf.checkpoint import QuantizedCheckpoint
    from qresafe.stages import qpatch

    before = QuantizedCheckpoint.open(q0)
    changed = {name: (before.read(name).codes + 1).clamp(max=7) for name in before.names[:2]}
    before.rewrite(folder / "q", changed)
    file, out, key = folder / "p.qpatch", folder / "out", folder / "my.key"
    qpatch.create(q0, folder / "q", file)
    signing.generate_key(key)
    signature = signing.sign(file, key)[0]
    sound, said = file.read_bytes(), json.loads(signature.read_text())
    head = 8 + int.from_bytes(sound[:8], "little")

    def apply(data: bytes) -> None:
        shutil.rmtree(out, ignore_errors=True)
        qpatch.apply(_written(folder / "x.qpatch", data), q0, out)

    def verify(data: bytes) -> None:
        signature.write_bytes(data)
        signing.verify(file, key.with_name("my.key.pub"))

    def patches(chance: random.Random) -> bytes:
        whole = chance.random() < 0.5
        return inputs.damaged(chance, sound) if whole else inputs.damaged_head(chance, sound, head)

    yield Kind("Patch file", "qpatch.apply", 800, patches, apply)
    make = partial(inputs.twisted_json, data=said)
    yield Kind("Signature file", "signing.verify", 800, make, verify)


def _written(file: Path, data: bytes) -> Path:
    file.write_bytes(data)
    return file


def main() -> None:
    """Run all kinds, print their defects, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", default="", help="kinds whose name holds this; no page is written"
    )
    asked = parser.parse_args()
    from qresafe.embedded.build import embedded_model_path

    outcomes = []
    with tempfile.TemporaryDirectory() as scratch:
        for kind in kinds(Path(scratch), Path(embedded_model_path())):
            if asked.only not in kind.name:
                continue
            outcome = measure(kind, kind.cases, asked.seed)
            outcomes.append(outcome)
            print(
                f"{kind.name}: {outcome.accepted} accepted, {outcome.refused} refused", flush=True
            )
            for number, (what, data) in enumerate(outcome.defects.items()):
                KEPT.mkdir(parents=True, exist_ok=True)
                kept = KEPT / f"{kind.name.replace('/', ' ')}-{number}"
                kept.write_bytes(data)
                print(f"  DEFECT {what} ({kept})", flush=True)
    if not asked.only:
        write_page([outcome.row() for outcome in outcomes], SECONDS, ROOM)
    sys.exit(any(outcome.defects for outcome in outcomes))


if __name__ == "__main__":
    main()
