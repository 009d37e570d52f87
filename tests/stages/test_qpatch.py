"""*.qpatch files: apply and revert by bytes, and what damaged or hostile files do (nothing)."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny_llama
from foreign import write_awq, write_gguf, write_gptq
from gguf import GGMLQuantizationType, quants
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qresafe.errors import CorruptArtifactError, ModelError, ResourceError, UserError
from qresafe.hf.checkpoint import QuantizedCheckpoint
from qresafe.hf.models import resolve
from qresafe.hf.tensor_files import TensorFiles
from qresafe.quantize_specs import RtnSpec
from qresafe.quantizers.rtn import quantize
from qresafe.specs import ModelSpec
from qresafe.stages import qpatch

Edit = Callable[[dict[str, Any], dict[str, Any]], None]


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with q0/, q/ and a patch p.qpatch of 1 % of the codes."""
    folder = tmp_path_factory.mktemp("qpatch")
    quantize(tiny_llama, folder, RtnSpec(bits=4, group_size=32))
    (folder / "checkpoint").rename(folder / "q0")
    q0 = QuantizedCheckpoint.open(folder / "q0")
    draw = torch.Generator().manual_seed(0)
    codes = {}
    for name in q0.names:
        old = q0.read(name).codes
        chosen = torch.rand(old.shape, generator=draw) < 0.01
        codes[name] = torch.where(chosen, (old + 1).clamp(max=7), old)
    q0.rewrite(folder / "q", codes)
    qpatch.create(folder / "q0", folder / "q", folder / "p.qpatch", key="abc")
    return folder


def same_files(a: Path, b: Path) -> bool:
    names = sorted(path.name for path in a.iterdir())
    if names != sorted(path.name for path in b.iterdir()):
        return False
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def test_apply_gives_q_and_revert_gives_q0_back(made: Path, tmp_path: Path) -> None:
    applied = qpatch.apply(made / "p.qpatch", made / "q0", tmp_path / "q")
    assert same_files(tmp_path / "q", made / "q")
    reverted = qpatch.revert(made / "p.qpatch", tmp_path / "q", tmp_path / "q0")
    assert same_files(tmp_path / "q0", made / "q0")
    assert not same_files(made / "q0", made / "q")
    assert applied["codes_changed"] == reverted["codes_changed"] > 0


def moved(q0: QuantizedCheckpoint, target: Path) -> Path:
    """Rewrite a checkpoint with every seventh code moved by one."""
    codes = {}
    for name in q0.names:
        old = q0.read(name)
        there = torch.arange(old.codes.numel()).view(old.codes.shape) % 7 == 0
        step = torch.where(old.codes < old.grid.high, 1, -1)
        codes[name] = torch.where(there, old.codes + step, old.codes)
    return q0.rewrite(target, codes)


def sharded(target: Path, source: Path) -> None:
    quantize(source, target.parent / "whole", RtnSpec(bits=3, group_size=32))
    tensors = load_file(target.parent / "whole" / "checkpoint" / "model.safetensors")
    shutil.copytree(target.parent / "whole" / "checkpoint", target)
    (target / "model.safetensors").unlink()
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        mine = {name: t for name, t in tensors.items() if where[name] == file}
        save_file(mine, target / file, {"format": "pt"})
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


ELSEWHERE: dict[str, Callable[[Path, Path], object]] = {
    "gptq v1, act order": lambda target, source: write_gptq(target, source, desc_act=True),
    "gptq v2, 3 bits": lambda target, source: write_gptq(target, source, bits=3, packing="gptq_v2"),
    "awq gemm": write_awq,
    "two shards, 3 bits": sharded,
}


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_checkpoints_made_elsewhere_come_back(tiny_llama: Path, tmp_path: Path, kind: str) -> None:
    ELSEWHERE[kind](tmp_path / "q0", tiny_llama)
    (tmp_path / "q0" / "README.md").write_text("not hashed, but copied")
    moved(QuantizedCheckpoint.open(tmp_path / "q0"), tmp_path / "q")
    counts = qpatch.create(tmp_path / "q0", tmp_path / "q", tmp_path / "p.qpatch")
    # ceil(size / 7) of each layer
    assert counts["codes_changed"] == sum(-(-n // 7) for n in counts["codes_by_layer"].values())
    qpatch.apply(tmp_path / "p.qpatch", tmp_path / "q0", tmp_path / "applied")
    qpatch.revert(tmp_path / "p.qpatch", tmp_path / "applied", tmp_path / "reverted")
    assert same_files(tmp_path / "applied", tmp_path / "q")
    assert same_files(tmp_path / "reverted", tmp_path / "q0")
    assert not same_files(tmp_path / "q", tmp_path / "q0")


def test_a_gguf_file_alone_and_in_a_folder(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One patch, made of folders, serves the file on its own, under any name."""
    monkeypatch.setenv("QRESAFE_CACHE", str(tmp_path / "cache"))
    kind, patch = GGMLQuantizationType.Q4_0, tmp_path / "p.qpatch"
    file = tmp_path / "m.gguf"
    write_gguf(file, tiny_llama, lambda w: (quants.quantize(w, kind), kind))
    folder = Path(resolve(ModelSpec(path=str(file))).path)
    q = moved(QuantizedCheckpoint.open(folder), tmp_path / "q")
    qpatch.create(folder, q, patch)
    renamed = file.rename(tmp_path / "other.gguf")
    told = qpatch.apply(patch, renamed, tmp_path / "new" / "q.gguf")
    assert told["checkpoint"] == "patched"
    made = tmp_path / "new" / "q.gguf"
    assert made.read_bytes() == (q / "m.gguf").read_bytes() != renamed.read_bytes()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["q.gguf"]
    assert qpatch.verify(patch, made)["checkpoint"] == "patched"
    assert qpatch.verify(patch, q)["checkpoint"] == "patched"
    qpatch.revert(patch, made, tmp_path / "back.gguf")
    assert (tmp_path / "back.gguf").read_bytes() == renamed.read_bytes()
    with pytest.raises(ModelError, match=r"ends in \.gguf"):
        qpatch.apply(patch, renamed, tmp_path / "folder")
    with pytest.raises(ModelError, match=r"not the patch's Q0 \(q.gguf differs\)"):
        qpatch.apply(patch, made, tmp_path / "twice.gguf")
    qpatch.create(renamed, made, tmp_path / "lone.qpatch")
    assert qpatch.read(tmp_path / "lone.qpatch")[0].base.keys() == {"other.gguf"}
    assert qpatch.verify(tmp_path / "lone.qpatch", made)["checkpoint"] == "patched"


def test_what_a_patch_could_not_restore_is_refused(made: Path, tmp_path: Path) -> None:
    odd = {name: Path(shutil.copytree(made / name, tmp_path / name)) for name in ("q0", "q")}
    for folder in odd.values():
        (folder / "my notes.txt").write_text("a space")
    with pytest.raises(ModelError, match=r"cannot name the file .my notes\.txt"):
        qpatch.create(odd["q0"], odd["q"], tmp_path / "p.qpatch")


def test_bits_beside_the_codes_are_refused(tmp_path: Path) -> None:
    """What lies in the last word beside the codes would be lost."""
    write_gptq(tmp_path / "q0", save_tiny_llama(tmp_path / "w", hidden=40), bits=3, group=40)
    q0 = QuantizedCheckpoint.open(tmp_path / "q0")
    name = q0.names[0]
    words = q0.files[f"{name}.qweight"].clone()
    words[-1] |= -(2**31)  # 40 x 3 = 120 of 128 bits are codes
    q0.files.overwrite(tmp_path / "q0", f"{name}.qweight", words)
    moved(q0, tmp_path / "q")
    with pytest.raises(ModelError, match="holds more than its codes"):
        qpatch.create(tmp_path / "q0", tmp_path / "q", tmp_path / "p.qpatch")
    assert not (tmp_path / "p.qpatch").exists()


def test_verify_tells_q0_from_q(made: Path) -> None:
    found = qpatch.verify(made / "p.qpatch", made / "q0")
    assert found["checkpoint"] == "base"
    assert found["patch_key"] == "abc"
    assert qpatch.verify(made / "p.qpatch", made / "q")["checkpoint"] == "patched"


def test_the_file_is_small(made: Path, tmp_path: Path) -> None:
    counts = qpatch.create(made / "q0", made / "q", tmp_path / "p.qpatch")
    assert counts["bytes_per_changed_code"] <= 2.5
    assert 0.008 < counts["fraction_changed"] < 0.012  # 1 % of 73,728, less those already at 7


def test_a_patch_that_changes_nothing_works(made: Path, tmp_path: Path) -> None:
    counts = qpatch.create(made / "q0", made / "q0", tmp_path / "none.qpatch")
    assert counts["codes_changed"] == 0
    qpatch.apply(tmp_path / "none.qpatch", made / "q0", tmp_path / "q")
    assert same_files(tmp_path / "q", made / "q0")


def test_the_wrong_base_is_refused_before_anything_is_written(made: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(made / "q0", tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"extra": 1}))
    for call, folder, meant in (
        (qpatch.apply, other, "Q0"),
        (qpatch.apply, made / "q", "Q0"),
        (qpatch.revert, made / "q0", "Q"),
    ):
        with pytest.raises(ModelError, match=f"not the patch's {meant} .* differs"):
            call(made / "p.qpatch", folder, tmp_path / "out")
    with pytest.raises(ModelError, match=r"neither .*config\.json differs"):
        qpatch.verify(made / "p.qpatch", other)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_an_existing_target_and_a_missing_patch_are_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="exists already"):
        qpatch.apply(made / "p.qpatch", made / "q0", tmp_path)
    with pytest.raises(ModelError, match="no such patch file"):
        qpatch.apply(tmp_path / "absent.qpatch", made / "q0", tmp_path / "out")


def test_a_full_disk_leaves_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the codes are written, aside, when the disk is full; Q never appears."""
    overwrite, calls = TensorFiles.overwrite, []

    def filling(self: TensorFiles, folder: Path, name: str, value: torch.Tensor) -> None:
        calls.append(folder)
        if len(calls) == 7:  # of 14 layers
            assert (tmp_path / "q") not in calls, "it is built aside"
            raise OSError(errno.ENOSPC, "No space left on device")
        overwrite(self, folder, name, value)

    monkeypatch.setattr(TensorFiles, "overwrite", filling)
    with pytest.raises(ResourceError, match="the disk is full"):
        qpatch.apply(made / "p.qpatch", made / "q0", tmp_path / "q")
    assert len(calls) == 7
    assert list(tmp_path.iterdir()) == []


def rewritten(patch: Path, target: Path, edit: Edit) -> Path:
    """Write a copy of a patch file after `edit(tensors, header)`."""
    tensors = load_file(patch)
    with safe_open(patch, framework="pt") as file:
        metadata = dict(file.metadata())
    header = json.loads(metadata["header"])
    edit(tensors, header)
    save_file(tensors, target, metadata | {"header": json.dumps(header)})
    return target


def rename_layer(tensors: dict[str, Any], header: dict[str, Any]) -> None:
    for name in [n for n in tensors if n.startswith("model.layers.0.mlp.up_proj/")]:
        tensors["../../evil/" + name.split("/")[1]] = tensors.pop(name)


def name_a_path(tensors: dict[str, Any], header: dict[str, Any]) -> None:
    for state in ("base", "patched"):
        header[state]["../../evil"] = "0" * 64


def widen(tensors: dict[str, Any], header: dict[str, Any]) -> None:
    name = next(n for n in tensors if n.endswith("/header"))
    tensors[name] = torch.tensor([2**62, 2**61]).view(torch.uint8)


def grow_codes(tensors: dict[str, Any], header: dict[str, Any]) -> None:
    for name in tensors:
        if name.endswith("/nibbles"):
            tensors[name] = torch.full_like(tensors[name], 0x77)  # +7 everywhere: out of range


def lose_a_part(tensors: dict[str, Any], header: dict[str, Any]) -> None:
    del tensors[next(n for n in tensors if n.endswith("/upper"))]


def promise_another_result(tensors: dict[str, Any], header: dict[str, Any]) -> None:
    header["patched"]["model.safetensors"] = "0" * 64


def header_of_another_kind(tensors: dict[str, Any], header: dict[str, Any]) -> None:
    header["base"] = ["model.safetensors"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (rename_layer, r"names a layer '\.\./\.\./evil'"),
        (name_a_path, r"names the file '\.\./\.\./evil'"),
        (widen, "wrong length"),
        (grow_codes, "outside"),
        (lose_a_part, "no list of bytes 'upper'"),
        (promise_another_result, "hashes that it promises"),
        (header_of_another_kind, "header is malformed"),
    ],
)
def test_a_hostile_patch_writes_nothing(
    made: Path, tmp_path: Path, edit: Edit, message: str
) -> None:
    patch = rewritten(made / "p.qpatch", tmp_path / "evil.qpatch", edit)
    with pytest.raises(UserError, match=message) as failure:
        qpatch.apply(patch, made / "q0", tmp_path / "deep" / "out")
    assert "\n" not in str(failure.value)
    left = sorted(p.name for p in tmp_path.rglob("*") if p.is_file())
    assert left == ["evil.qpatch"]


@pytest.mark.parametrize("cut", [0, 7, 100, 3000, -1])
def test_a_truncated_patch_is_damaged(made: Path, tmp_path: Path, cut: int) -> None:
    (tmp_path / "cut.qpatch").write_bytes((made / "p.qpatch").read_bytes()[:cut])
    with pytest.raises(CorruptArtifactError, match="damaged patch"):
        qpatch.verify(tmp_path / "cut.qpatch", made / "q0")


def test_another_format_is_named(made: Path, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "x.qpatch", {"header": '{"format": "qpatch-9"}'})
    with pytest.raises(CorruptArtifactError, match="'qpatch-9' instead of 'qpatch-1'"):
        qpatch.read(tmp_path / "x.qpatch")
