"""Critical weights in 16 bits above other methods; scores against plain autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from qresafe.core.masked_lora import attach
from qresafe.embedded.calibration import harmful_texts
from qresafe.errors import DataError, ModelError, SpecError
from qresafe.hf.chat import prompt_ids
from qresafe.hf.checkpoint import QuantizedCheckpoint, bits_per_weight, load_dense
from qresafe.hf.generate import generate_batch
from qresafe.hf.models import load_model, load_tokenizer
from qresafe.judges.base import Verdict
from qresafe.quantize_specs import AqlmSpec, BnbSpec, Critical16Spec, QloraSpec, RtnSpec
from qresafe.quantizers import critical16, rtn
from qresafe.specs import GenerateSpec

IDS = torch.arange(10, 40)[None]
INT4 = RtnSpec(bits=4, group_size=32)


@pytest.fixture(autouse=True)
def judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every answer for a refusal: a random model has none of its own."""

    class Judges:
        def get(self, name: str) -> Any:
            return lambda axis, prompt, answer: Verdict(name, "")

    monkeypatch.setattr(critical16, "judges", Judges())


def spec(**changes: Any) -> Critical16Spec:
    plain = {"base": INT4, "harmful": 3, "max_new_tokens": 6, "judge": "refused"}
    return Critical16Spec(**(plain | changes))


def sums_of_scores(source: Path, wanted: Critical16Spec) -> dict[str, torch.Tensor]:
    """Return sum over samples of |W * d(-log p)/dW|, one ordinary backward pass per sample."""
    model, tokenizer = load_model(source), load_tokenizer(source)
    sums: dict[str, torch.Tensor] = {}
    for text in harmful_texts(wanted):
        prompt = prompt_ids(tokenizer, text)
        answer = generate_batch(model, tokenizer, [prompt], [text], GenerateSpec(max_new_tokens=6))[
            0
        ].ids
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").backward()
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                score = (module.weight * module.weight.grad).abs().detach()
                sums[name] = sums.get(name, 0) + score
    return sums


def test_kept_are_the_weights_that_plain_autograd_finds(tiny_llama: Path, tmp_path: Path) -> None:
    counts = critical16.quantize(tiny_llama, tmp_path, spec()).counts
    source = load_file(tiny_llama / "model.safetensors")
    scores = sums_of_scores(tiny_llama, spec())
    total = sum(score.numel() for score in scores.values())
    wanted = round(0.05 * total)  # 73728 weights: 3686
    assert counts["kept_weights"] == wanted == 3686
    assert counts["refusals"] == 3
    cut = torch.cat([s.flatten() for s in scores.values()]).topk(wanted).values[-1]
    checkpoint = QuantizedCheckpoint.open(tmp_path / "checkpoint")
    agreed = 0
    for name in checkpoint.names:
        grid = checkpoint.read(name).grid
        positions = grid.positions  # type: ignore[attr-defined]
        agreed += int((scores[name].flatten()[positions] >= cut).sum())
        weight = source[f"{name}.weight"].flatten()[positions]
        assert torch.equal(grid.values, weight.half())  # type: ignore[attr-defined]
    assert agreed >= wanted - 3  # those at the cut may change places in float32


@pytest.mark.parametrize("structure", ["weights", "rows", "blocks"])
@pytest.mark.parametrize("base", [INT4, BnbSpec(double_quant=True)], ids=["int4", "nf4"])
def test_the_overlay_is_deployed_as_it_is_decoded(
    tiny_llama: Path, tmp_path: Path, base: Any, structure: str
) -> None:
    critical16.quantize(tiny_llama, tmp_path, spec(base=base, structure=structure))
    dense, layers = load_dense(tmp_path / "checkpoint")
    ours, theirs = dense(IDS).logits, load_model(tmp_path / "checkpoint")(IDS).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for tensor in layers.values():
        assert torch.equal(tensor.grid.encode(tensor.dense()), tensor.codes)
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")(IDS).logits
    assert not torch.allclose(plain, theirs, atol=1e-2)  # as the manifest says


@pytest.mark.parametrize("structure", ["weights", "rows", "blocks"])
def test_the_overlay_of_layers_without_weights_is_deployed(
    tiny_llama: Path, tmp_path: Path, structure: str
) -> None:
    few = {"sequences": 2, "max_length": 32, "rounds": 1, "beam": 1, "finetune_steps": 0}
    base = AqlmSpec(codebook_bits=4, **few)  # loaded, its layers hold codes and codebooks
    critical16.quantize(tiny_llama, tmp_path, spec(base=base, structure=structure))
    ours = load_dense(tmp_path / "checkpoint")[0](IDS).logits
    theirs = load_model(tmp_path / "checkpoint")(IDS).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


TILES = [("rows", None), ("blocks", (16, 16)), ("blocks", (1, 32))]


@pytest.mark.parametrize(("structure", "block"), TILES)
def test_kept_tiles_have_the_largest_mean_scores(
    tiny_llama: Path, tmp_path: Path, structure: str, block: tuple[int, int] | None
) -> None:
    wanted = spec(structure=structure, block=block)
    counts = critical16.quantize(tiny_llama, tmp_path, wanted).counts
    scores = sums_of_scores(tiny_llama, wanted)
    means, sizes = [], []
    for score in scores.values():
        rows, columns = block or (1, score.shape[1])
        for top in range(0, score.shape[0], rows):
            for left in range(0, score.shape[1], columns):
                tile = score[top : top + rows, left : left + columns]
                means.append(float(tile.mean()))
                sizes.append(tile.numel())
    kept, room = 0, 3686  # 5 % of 73728
    for place in sorted(range(len(means)), key=lambda place: -means[place]):
        if sizes[place] > room:
            break
        kept, room = kept + 1, room - sizes[place]
    assert counts[f"kept_{structure}"] == kept
    assert counts["kept_weights"] == 3686 - room
    cut = sorted(means, reverse=True)[kept - 1]
    source = load_file(tiny_llama / "model.safetensors")
    checkpoint = QuantizedCheckpoint.open(tmp_path / "checkpoint")
    for name, score in scores.items():
        if tiles := checkpoint.overlays.kept(name, tuple(score.shape)):
            rows, columns = tiles.tile
            for top, left, values in zip(*tiles.corners(), tiles.values, strict=True):
                place = slice(top, top + rows), slice(left, left + columns)
                assert float(score[place].mean()) >= cut * (1 - 1e-5)
                assert torch.equal(values, source[f"{name}.weight"][place].half())
    stored = load_file(tmp_path / "checkpoint" / "critical16.safetensors")
    # 16 bits a value; at most log2(tiles / kept) + 2 bits, in bytes, and a header for positions
    positions = sum(t.nbytes for n, t in stored.items() if not n.endswith("/values"))
    assert sum(t.nbytes for t in stored.values()) - positions == 2 * counts["kept_weights"]
    assert positions < 14 * (16 + 4) + kept * 2
    more = bits_per_weight(tmp_path / "checkpoint") * 73728 / 8
    rtn.quantize(tiny_llama, tmp_path / "rtn", INT4)
    alone = bits_per_weight(tmp_path / "rtn" / "checkpoint") * 73728 / 8
    assert more - alone == pytest.approx(sum(t.nbytes for t in stored.values()))


def test_whole_layers_are_served_by_plain_transformers(tiny_llama: Path, tmp_path: Path) -> None:
    result = critical16.quantize(tiny_llama, tmp_path, spec(structure="layers", fraction=0.2))
    kept = result.counts["kept_layers"]
    source = load_file(tiny_llama / "model.safetensors")
    sizes = {n: source[f"{n}.weight"].numel() for n in kept}
    assert 0 < sum(sizes.values()) <= 0.2 * 73728
    stored = load_file(tmp_path / "checkpoint" / "model.safetensors")
    for name in kept:
        assert torch.equal(stored[f"{name}.weight"], source[f"{name}.weight"].half())
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")(IDS).logits
    assert torch.equal(plain, load_dense(tmp_path / "checkpoint")[0](IDS).logits)
    # 16 bits for what is kept; else 4, a float32 scale and a 4-bit zero point per 32 weights, and
    # a shape of 128 bits per layer
    inside, rest = sum(sizes.values()), 73728 - sum(sizes.values())
    bits = 16 * inside + (4 + 32 / 32 + 4 / 32) * rest + 128 * (14 - len(kept))
    assert bits_per_weight(tmp_path / "checkpoint", kept) == pytest.approx(bits / 73728)


def test_bits_per_weight_counts_what_is_stored(tiny_llama: Path, tmp_path: Path) -> None:
    rtn.quantize(tiny_llama, tmp_path / "rtn", INT4)
    alone = bits_per_weight(tmp_path / "rtn" / "checkpoint")
    assert alone == pytest.approx(4 + 32 / 32 + 4 / 32 + 14 * 128 / 73728)
    critical16.quantize(tiny_llama, tmp_path, spec())
    more = bits_per_weight(tmp_path / "checkpoint") - alone
    # 16 bits a value and at most floor(log2(1 / 0.05)) + 2 = 6 a position; headers come on top
    assert 0.05 * 16 < more < 0.05 * 22 + 14 * (128 + 16) / 73728 + 0.05


@pytest.mark.parametrize("structure", ["weights", "rows", "blocks"])
def test_a_patch_leaves_kept_weights_alone(
    tiny_llama: Path, tmp_path: Path, structure: str
) -> None:
    critical16.quantize(tiny_llama, tmp_path, spec(structure=structure))
    model, quantized = load_dense(tmp_path / "checkpoint")
    layers = attach(model, quantized, rank=2, alpha=2.0, on="weight", through_grid=True, seed=0)
    with torch.no_grad():
        for layer in layers.values():
            layer.B.fill_(0.5)
    codes = {name: layer.codes() for name, layer in layers.items()}
    seen = model(IDS).logits  # what training sees is what is deployed
    checkpoint = QuantizedCheckpoint.open(tmp_path / "checkpoint")
    folder = checkpoint.rewrite(tmp_path / "q", codes)
    deployed = load_model(folder)
    torch.testing.assert_close(deployed(IDS).logits, seen, atol=1e-4, rtol=1e-4)
    for name, tensor in quantized.items():
        positions = getattr(tensor.grid, "positions", torch.tensor([], dtype=torch.long))
        if structure != "weights" and not len(positions):
            continue  # no row or block of this layer
        kept = deployed.get_submodule(name).weight.flatten()[positions]
        assert torch.equal(kept, tensor.grid.values.float())  # type: ignore[attr-defined]
        whole = len(positions) == tensor.codes.numel()  # blocks may fill a small layer
        assert torch.equal(codes[name], tensor.codes) == whole
    sizes = [sum(f.stat().st_size for f in p.iterdir()) for p in (folder, checkpoint.folder)]
    assert sizes[0] == sizes[1]


def test_nothing_kept_is_the_base(tiny_llama: Path, tmp_path: Path) -> None:
    critical16.quantize(tiny_llama, tmp_path / "a", spec(fraction=0.0))
    rtn.quantize(tiny_llama, tmp_path / "b", INT4)
    made = [tmp_path / n / "checkpoint" / "model.safetensors" for n in ("a", "b")]
    assert made[0].read_bytes() == made[1].read_bytes()


@pytest.mark.parametrize("structure", ["weights", "rows", "blocks", "layers"])
def test_the_same_call_gives_the_same_bytes(
    tiny_llama: Path, tmp_path: Path, structure: str
) -> None:
    wanted = spec(structure=structure, fraction=0.2)
    for name in ("a", "b"):
        critical16.quantize(tiny_llama, tmp_path / name, wanted)
    critical16.quantize(tiny_llama, tmp_path / "a", wanted)  # as after a kill
    folders = [tmp_path / name / "checkpoint" for name in ("a", "b")]
    files = {file.name for folder in folders for file in folder.iterdir()}
    assert all(len({(f / name).read_bytes() for f in folders}) == 1 for name in files)


def test_what_cannot_be_done_is_said(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="W refuses none of the prompts"):
        critical16.quantize(tiny_llama, tmp_path, spec(judge="complied"))
    with pytest.raises(SpecError, match=r"no layer is as small as 0\.001.*at least 0\.0278"):
        # the smallest, k_proj, has 32 x 64 of 73728 weights
        critical16.quantize(tiny_llama, tmp_path, spec(structure="layers", fraction=0.001))
    with pytest.raises(SpecError, match=r"no row is as small as 0\.0005.*at least 0\.0009"):
        # a row of 64 among 73728
        critical16.planned(tiny_llama, spec(structure="rows", fraction=0.0005))
    with pytest.raises(ModelError, match=r"q_proj is 64 x 64, which blocks of 48 x 16 do not fill"):
        critical16.planned(tiny_llama, spec(structure="blocks", block=(48, 16)))
    with pytest.raises(ValidationError, match="block is of structure: blocks"):
        spec(structure="rows", block=(4, 4))
    assert spec(structure="blocks").block == (16, 16)
    with pytest.raises(ValidationError, match=r"base\.deploy: merged"):
        Critical16Spec(base=QloraSpec(deploy="adapter"))
