"""Patches of scales: written in place, carried by *.qpatch, trained, and refused in words."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from foreign import write_awq, write_gguf, write_gptq
from gguf import GGMLQuantizationType, quants
from patching import made_pairs, move_codes_and_scales, patch_inputs, patch_spec
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from upath import UPath

from qresafe.artifacts import Run
from qresafe.core.scales import scale_of, with_scale
from qresafe.errors import CorruptArtifactError, ModelError, SpecError
from qresafe.hf.checkpoint import QuantizedCheckpoint, load_dense
from qresafe.hf.models import load_model, resolve
from qresafe.hf.warm import ModelInput
from qresafe.progress import Silent
from qresafe.quantize_specs import (
    AqlmSpec,
    AwqSpec,
    BnbSpec,
    CheckpointSpec,
    Critical16Spec,
    Fp8Spec,
    GptqSpec,
    LlmQatSpec,
    QloraSpec,
    QuantizeSpec,
    RtnSpec,
)
from qresafe.registry import quantizers
from qresafe.specs import ExperimentSpec, ModelSpec, PatchSpec
from qresafe.stages import qpatch
from qresafe.stages.export import export
from qresafe.stages.patch import key_spec, needs_reference, patch
from qresafe.stages.patch_loop import train_patch
from qresafe.stages.patch_output import read_tensors
from qresafe.stages.patchable import check_patchable
from qresafe.stages.quantize import quantize
from qresafe.stages.runtime import InProcessRuntime
from qresafe.stages.train_engine import LocalEngine

IDS = torch.arange(10, 30)[None]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def by_method(spec: QuantizeSpec) -> Callable[[Path, Path], None]:
    def make(target: Path, source: Path) -> None:
        quantizers.get(spec.method)(source, target.parent / "made", spec)
        (target.parent / "made" / "checkpoint").rename(target)

    return make


PLAIN: dict[str, Callable[[Path, Path], object]] = {
    "int2 groups": by_method(RtnSpec(bits=2, group_size=32)),
    "int8 rows": by_method(RtnSpec(bits=8, group_size=-1, symmetric=True)),
    "nf4": by_method(BnbSpec(format="nf4")),
    "gptq v1, act order": lambda target, source: write_gptq(target, source, desc_act=True),
    "awq gemm": write_awq,
}


def same_files(a: Path, b: Path) -> bool:
    names = sorted(path.name for path in a.iterdir())
    if names != sorted(path.name for path in b.iterdir()):
        return False
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


@pytest.mark.parametrize("kind", PLAIN)
def test_codes_and_scales_go_there_and_come_back(
    tiny_llama: Path, tmp_path: Path, kind: str
) -> None:
    PLAIN[kind](tmp_path / "q0", tiny_llama)
    q0 = QuantizedCheckpoint.open(tmp_path / "q0")
    q = QuantizedCheckpoint.open(move_codes_and_scales(q0, tmp_path / "q"))
    patched = q0.names[::2]
    stored = {part for name in patched for part in q0.codec.tensors(name)}
    assert {name for name in q0.files if not torch.equal(q0.files[name], q.files[name])} <= stored
    assert [f.stat().st_size for f in sorted((tmp_path / "q0").iterdir())] == [
        f.stat().st_size for f in sorted((tmp_path / "q").iterdir())
    ]
    counts = qpatch.create(tmp_path / "q0", tmp_path / "q", tmp_path / "p.qpatch", key="k")
    scales = {name: [scale_of(c.read(name).grid) for c in (q0, q)] for name in q0.names}
    differing = sum(int((old != new).sum()) for old, new in scales.values())
    assert counts["scales"] == sum(old.numel() for old, _ in scales.values())
    assert counts["scales_changed"] == differing > 0.3 * counts["scales"]
    assert counts["codes_changed"] > 0
    applied = qpatch.apply(tmp_path / "p.qpatch", tmp_path / "q0", tmp_path / "applied")
    qpatch.revert(tmp_path / "p.qpatch", tmp_path / "applied", tmp_path / "reverted")
    assert same_files(tmp_path / "applied", tmp_path / "q")
    assert same_files(tmp_path / "reverted", tmp_path / "q0")
    assert applied["scales_changed"] == differing
    told = qpatch.verify(tmp_path / "p.qpatch", tmp_path / "applied")
    assert (told["checkpoint"], told["scales_changed"]) == ("patched", differing)


@pytest.mark.parametrize("kind", ["int2 groups", "nf4"])
def test_plain_transformers_runs_what_the_new_scales_decode_to(
    tiny_llama: Path, tmp_path: Path, kind: str
) -> None:
    PLAIN[kind](tmp_path / "q0", tiny_llama)
    q = move_codes_and_scales(QuantizedCheckpoint.open(tmp_path / "q0"), tmp_path / "q")

    def greedy(model: object) -> list[int]:
        options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        return model.generate(IDS, **options)[0].tolist()  # type: ignore[attr-defined,no-any-return]

    alone = greedy(load_model(q))
    assert alone == greedy(load_dense(q)[0])
    assert alone != greedy(load_model(tmp_path / "q0"))  # the patch shows, or nothing is shown


@pytest.fixture
def int2(tiny_llama: Path, tmp_path: Path) -> Path:
    """A folder with q0/, q/ and p.qpatch of codes and scales."""
    PLAIN["int2 groups"](tmp_path / "q0", tiny_llama)
    move_codes_and_scales(QuantizedCheckpoint.open(tmp_path / "q0"), tmp_path / "q")
    qpatch.create(tmp_path / "q0", tmp_path / "q", tmp_path / "p.qpatch")
    return tmp_path


def header_of(patch: Path) -> dict[str, object]:
    with safe_open(str(patch), framework="pt") as file:
        return dict(json.loads(file.metadata()["header"]))


def test_the_format_is_new_only_where_scales_change(int2: Path) -> None:
    q0 = QuantizedCheckpoint.open(int2 / "q0")
    name = q0.names[0]
    q0.rewrite(int2 / "codes", {name: q0.read(name).codes.flip(0)})
    qpatch.create(int2 / "q0", int2 / "codes", int2 / "codes.qpatch")
    assert header_of(int2 / "codes.qpatch").keys() == {"format", "base", "patched", "key"}
    assert header_of(int2 / "codes.qpatch")["format"] == "qpatch-1"
    assert header_of(int2 / "p.qpatch")["format"] == "qpatch-2"
    q0.rewrite(int2 / "scales", {}, scales={name: scale_of(q0.read(name).grid) * 1.5})
    counts = qpatch.create(int2 / "q0", int2 / "scales", int2 / "s.qpatch")
    assert (counts["codes_changed"], counts["bytes_per_changed_code"]) == (0, 0.0)
    assert counts["scales_changed"] == scale_of(q0.read(name).grid).numel()
    qpatch.apply(int2 / "s.qpatch", int2 / "q0", int2 / "applied")
    assert same_files(int2 / "applied", int2 / "scales")


def test_damaged_scales_of_a_patch_are_refused(int2: Path) -> None:
    tensors, header = load_file(int2 / "p.qpatch"), header_of(int2 / "p.qpatch")

    def edited(**changes: torch.Tensor | None) -> Path:
        mine = {n: t for n, t in (tensors | changes).items() if t is not None}
        save_file(mine, int2 / "bad.qpatch", {"header": json.dumps(header)})
        return int2 / "bad.qpatch"

    name = next(n for n in tensors if "/scale/" in n).rpartition("/")[0]
    other = {f"other/scale/{n.rpartition('/')[2]}": t.clone() for n, t in tensors.items()
             if n.startswith(f"{name}/")}  # fmt: skip
    for changes, message in (
        ({f"{name}/wide": None}, "no list of bytes 'wide'"),
        ({f"{name}/header": tensors[f"{name}/header"].roll(1)}, "of the wrong length"),
        (other, "names a layer 'other'"),
        ({f"{name}/wide": tensors[f"{name}/wide"] ^ 1}, "does not have the hashes"),
    ):
        with pytest.raises(CorruptArtifactError, match=message):
            qpatch.apply(edited(**changes), int2 / "q0", int2 / "out")
        assert not (int2 / "out").exists()


def test_scales_that_no_checkpoint_can_hold_are_refused(int2: Path) -> None:
    q0 = QuantizedCheckpoint.open(int2 / "q0")
    scale = scale_of(q0.read(q0.names[0]).grid)
    for bad, message in (
        (scale / 0, "not finite"),
        (scale.half(), r"are torch\.float16 .*, not torch\.float32"),
        (scale[:-1], r"\(63, 4\), not torch\.float32 \(64, 4\)"),
    ):
        with pytest.raises(ModelError, match=message):
            q0.rewrite(int2 / "no", {}, scales={q0.names[0]: bad})
    with pytest.raises(ModelError, match="no quantized layer"):
        q0.rewrite(int2 / "no", {}, scales={"other": scale})
    assert not (int2 / "no").exists()


UNFIT: dict[str, Callable[[Path, Path], object]] = {
    "double quant": by_method(BnbSpec(double_quant=True)),
    "LLM.int8()": by_method(BnbSpec(format="int8")),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_formats_without_plain_scales_are_refused(
    tiny_llama: Path, tmp_path: Path, kind: str
) -> None:
    UNFIT[kind](tmp_path / "q0", tiny_llama)
    q0 = QuantizedCheckpoint.open(tmp_path / "q0")
    with pytest.raises(
        ModelError, match=r"are not stored as they are .*: set patch\.trains to codes"
    ):
        q0.require_scales()
    # a patch of codes is made as ever
    name = q0.names[0]
    q0.rewrite(tmp_path / "q", {name: q0.read(name).codes.flip(0)})
    counts = qpatch.create(tmp_path / "q0", tmp_path / "q", tmp_path / "p.qpatch")
    assert "scales" not in counts


def test_what_cannot_be_patched_is_said_before_any_work(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QRESAFE_CACHE", str(tmp_path / "cache"))
    scales = PatchSpec(trains="scales")
    for fine in (RtnSpec(), GptqSpec(), AwqSpec(), Fp8Spec(), LlmQatSpec(), BnbSpec(),
                 QloraSpec(base=BnbSpec()), Critical16Spec(structure="layers")):  # fmt: skip
        check_patchable(scales, fine)
    for unfit in (AqlmSpec(), BnbSpec(double_quant=True), BnbSpec(format="int8"), QloraSpec(),
                  QloraSpec(base=RtnSpec(), deploy="adapter"), Critical16Spec()):  # fmt: skip
        with pytest.raises(SpecError, match=r"in patch\.trains: set it to codes"):
            check_patchable(scales, unfit)
        check_patchable(PatchSpec(), unfit)
    kind = GGMLQuantizationType.Q8_0
    write_gguf(tmp_path / "m.gguf", tiny_llama, lambda w: (quants.quantize(w, kind), kind))
    with pytest.raises(ModelError, match="GGUF weights are not stored as they are"):
        check_patchable(scales, CheckpointSpec(path=str(tmp_path / "m.gguf")))
    write_awq(tmp_path / "awq", tiny_llama)
    check_patchable(scales, CheckpointSpec(path=str(tmp_path / "awq")))
    for wrong in ({"method": "flips"}, {"method": "dpo"}, {"through_grid": False},
                  {"start": "latent"}):  # fmt: skip
        with pytest.raises(ValueError, match="scales"):
            PatchSpec(trains="scales", **wrong)


def test_what_a_patch_of_scales_depends_on() -> None:
    assert not {"trains", "scale_lr"} & key_spec(PatchSpec(scale_lr=1e-3)).keys()
    assert key_spec(PatchSpec(trains="both"))["trains"] == "both"
    assert key_spec(PatchSpec(trains="scales", scale_lr=1e-3))["scale_lr"] == 1e-3
    dpo_mask = {"loss": "dpo"}
    assert needs_reference(PatchSpec(mask=dpo_mask))
    assert not needs_reference(PatchSpec(mask=dpo_mask, trains="scales"))  # no mask is made
    assert ExperimentSpec().has_adapter
    assert not ExperimentSpec(patch=PatchSpec(trains="scales")).has_adapter


FILES = ("adapter", "codes", "delta", "scales")


class Cut(Exception):
    """Stands for the death of the process."""


class CutEngine(LocalEngine):
    """Dies before its fifth optimizer step."""

    left = 4

    def step(self, lr: float) -> float:
        if not self.left:
            raise Cut
        self.left -= 1
        return super().step(lr)


@pytest.mark.parametrize("trains", ["scales", "both"])
def test_training_lowers_the_loss_and_a_kill_changes_no_bit(trains: str, tmp_path: Path) -> None:
    spec = patch_spec(trains=trains, scale_lr=3e-2, checkpoint_every=3, batch_size=14)

    def trained(folder: Path, engine: LocalEngine) -> dict[str, bytes]:
        train_patch(engine, patch_inputs(spec), spec, UPath(folder), Silent())
        return {name: (folder / f"{name}.safetensors").read_bytes() for name in FILES}

    whole = trained(tmp_path / "whole", LocalEngine())
    with pytest.raises(Cut):
        trained(tmp_path / "cut", CutEngine())
    assert trained(tmp_path / "cut", LocalEngine()) == whole
    lines = (tmp_path / "cut" / "history.jsonl").read_text().splitlines()
    history = [json.loads(line) for line in lines]
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]
    assert ("mask" in history[0]) == (trains == "both")
    assert (history[-1]["codes_changed"] > 0) == (trains == "both")
    assert history[-1]["scales_changed"] > 0.9
    q0 = patch_inputs(spec).quantized
    scales, codes, delta = (
        read_tensors(UPath(tmp_path / "cut" / f"{name}.safetensors"))
        for name in ("scales", "codes", "delta")
    )
    for name, tensor in q0.items():
        rescaled0 = with_scale(tensor.grid, scales[name]).decode(tensor.codes)
        by_codes = delta[name] - (rescaled0 - tensor.dense())  # float32 scales are not rounded
        if trains == "scales":
            assert torch.equal(codes[name], tensor.codes)
            assert by_codes.abs().max() < 1e-5
        else:  # codes move on Q0's own grid; a tie may fall to either side
            agree = codes[name] == tensor.grid.move(tensor.codes, by_codes)
            assert agree.float().mean() > 0.99


def test_scales_alone_from_disk_to_a_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    run = Run(str(tmp_path), "t")
    w = ModelInput.of(resolve(ModelSpec(path=str(tiny_llama))))
    q0 = quantize(run, w, RtnSpec(bits=2, group_size=16))
    objective = {"dpo": 0.0, "nll": 1.0, "kl": 0.0, "anchor": 0.1}
    spec = patch_spec(objective=objective, batch_size=8, steps=4, trains="scales", scale_lr=2e-2)
    made = patch(
        run,
        q0=ModelInput.in_folder(q0.path / "checkpoint", q0.key),
        pairs=made_pairs(run),
        reference=None,
        spec=spec,
        runtime=InProcessRuntime(),
        progress=Silent(),
    )
    assert made.manifest.counts["codes_changed"] == 0
    assert made.manifest.counts["scales_changed"] > 0.9
    q = export(run, q0, made, unrounded=False)
    counts = q.manifest.counts
    assert (counts["codes_changed"], counts["checkpoint_bytes"]) == (0, counts["q0_bytes"])
    assert counts["scales_changed"] == pytest.approx(
        made.manifest.counts["scales_changed"] * counts["scales"]
    )
    before, after = (QuantizedCheckpoint.open(one.path / "checkpoint") for one in (q0, q))
    differing = {n for n in before.files if not torch.equal(before.files[n], after.files[n])}
    assert differing == {f"{name}.weight_scale" for name in before.names}
    qpatch.revert(q.path / "patch.qpatch", q.path / "checkpoint", tmp_path / "back")
    assert same_files(tmp_path / "back", Path(str(q0.path / "checkpoint")))


def one_rank(rank: int, stage: int, folder: str) -> None:
    """Run as one of two gloo processes under DeepSpeed."""
    from qresafe.dist.train_engines import make_engine

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    spec = patch_spec(trains="both", scale_lr=2e-2, zero_stage=stage)
    engine = make_engine(torch.device("cpu"), stage)
    train_patch(engine, patch_inputs(spec), spec, UPath(folder), Silent())


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_workers_train_what_one_does(stage: int, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=one_rank, args=(rank, stage, str(tmp_path))) for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    spec = patch_spec(trains="both", scale_lr=2e-2)
    train_patch(LocalEngine(), patch_inputs(spec), spec, UPath(tmp_path / "one"), Silent())
    for file in ("adapter", "scales"):
        two, one = (
            read_tensors(UPath(f / f"{file}.safetensors")) for f in (tmp_path, tmp_path / "one")
        )
        assert two.keys() == one.keys()
        for name, tensor in one.items():  # sums over ranks round otherwise than one rank's
            torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
