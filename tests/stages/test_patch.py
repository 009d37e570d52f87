"""The reference and patch stages on a checkpoint from disk."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from patching import made_pairs, patch_spec
from upath import UPath

from qresafe.artifacts import Run
from qresafe.errors import DataError, SpecError
from qresafe.hf.checkpoint import QuantizedCheckpoint
from qresafe.hf.tensor_files import TensorFiles
from qresafe.hf.warm import ModelInput
from qresafe.hf.writing import write_latents
from qresafe.progress import Silent
from qresafe.quantize_specs import Critical16Spec, LlmQatSpec, RtnSpec
from qresafe.quantizers.rtn import quantize
from qresafe.specs import PatchSpec
from qresafe.stages.patch import key_spec, needs_reference, patch
from qresafe.stages.patch_output import read_tensors
from qresafe.stages.patchable import check_patchable
from qresafe.stages.reference import reference
from qresafe.stages.runtime import InProcessRuntime, read_table

OPTIONS = {"runtime": InProcessRuntime(), "progress": Silent()}


@pytest.fixture(scope="module")
def q0(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelInput:
    folder = tmp_path_factory.mktemp("q0")
    quantize(tiny_llama, folder, RtnSpec(group_size=16))
    return ModelInput.in_folder(folder / "checkpoint", "q0")


def test_reference_then_patch_from_disk(q0: ModelInput, tmp_path: Path) -> None:
    """Batches of the reference stage differ from training's, yet the first loss is ln 2."""
    run = Run(str(tmp_path), "t")
    pairs = made_pairs(run)
    spec = patch_spec(objective={"dpo": 1.0, "kl": 0.0, "anchor": 0.1}, batch_size=8, steps=4)
    scored = reference(run, q0=q0, pairs=pairs, batch_size=3, **OPTIONS)
    table = read_table(UPath(scored.path) / "reference.parquet")
    assert table["prompt_id"].to_pylist() == ["p0", "p1", "p2", "p3"]
    made = patch(run, q0=q0, pairs=pairs, reference=scored, spec=spec, **OPTIONS)
    counts = made.manifest.counts
    history = (UPath(made.path) / "history.jsonl").read_text().splitlines()
    assert json.loads(history[0])["parts"]["dpo"] == pytest.approx(math.log(2), abs=1e-5)
    assert (counts["steps"], len(history)) == (4, 4)
    assert 0 < counts["codes_changed"] < 1
    codes = read_tensors(UPath(made.path) / "codes.safetensors")
    assert all(tensor.abs().max() <= 8 for tensor in codes.values())
    again = patch(run, q0=q0, pairs=pairs, reference=scored, spec=spec, **OPTIONS)
    assert again.reused
    rarely = spec.model_copy(update={"checkpoint_every": 50})
    assert patch(run, q0=q0, pairs=pairs, reference=scored, spec=rarely, **OPTIONS).reused


def test_reference_of_no_preference_is_an_empty_table(q0: ModelInput, tmp_path: Path) -> None:
    run = Run(str(tmp_path), "t")
    pairs = made_pairs(run, preferences=0)
    scored = reference(run, q0=q0, pairs=pairs, batch_size=3, **OPTIONS)
    assert read_table(UPath(scored.path) / "reference.parquet").num_rows == 0


def test_patch_says_what_is_missing(q0: ModelInput, tmp_path: Path) -> None:
    run = Run(str(tmp_path), "t")
    pairs = made_pairs(run, preferences=0)
    with_dpo = patch_spec(objective="paper")
    with pytest.raises(DataError, match="no reference log-probs in patch: run the reference"):
        patch(run, q0=q0, pairs=pairs, reference=None, spec=with_dpo, **OPTIONS)
    kl_only = patch_spec(objective="default")
    with pytest.raises(DataError, match=r"no pair serves the terms \['kl'\]"):
        patch(run, q0=q0, pairs=pairs, reference=None, spec=kl_only, **OPTIONS)


def test_reference_is_needed_by_the_dpo_term_and_the_dpo_score() -> None:
    assert needs_reference(patch_spec(objective="paper"))
    assert not needs_reference(patch_spec(objective="default"))
    for score, needed in {"snip": True, "set_difference": True, "random": False}.items():
        mask = {"loss": "dpo", "score": score}
        assert needs_reference(patch_spec(objective="default", mask=mask)) == needed
    for method in ("dpo", "sft"):  # TRL takes its own
        assert not needs_reference(patch_spec(objective="paper", method=method))


def test_a_patch_from_latent_weights_moves_more_codes(
    q0: ModelInput, tiny_llama: Path, tmp_path: Path
) -> None:
    """RTN's latents are W's own weights; with the same small steps more of them cross a border."""
    run = Run(str(tmp_path), "t")
    pairs = made_pairs(run)
    files = TensorFiles(tiny_llama)
    latents = {n: files[f"{n}.weight"] for n in QuantizedCheckpoint.open(q0.ref.path).names}
    write_latents(tmp_path / "latent", latents)
    objective = {"dpo": 0.0, "nll": 1.0, "kl": 0.0, "anchor": 0.1}
    spec = patch_spec(objective=objective, batch_size=8, steps=2, lr=1e-3)
    given = {"q0": q0, "pairs": pairs, "reference": None} | OPTIONS
    plain = patch(run, spec=spec, **given)
    latent = spec.model_copy(update={"start": "latent"})
    made = patch(run, spec=latent, latents=UPath(tmp_path / "latent"), **given)
    changed = [one.manifest.counts["codes_changed"] for one in (plain, made)]
    assert changed[1] > 3 * changed[0]
    codes = read_tensors(UPath(made.path) / "codes.safetensors")
    delta = read_tensors(UPath(made.path) / "delta.safetensors")
    for name, tensor in QuantizedCheckpoint.open(q0.ref.path).items():
        snapped = tensor.grid.encode(tensor.dense() + delta[name])
        assert (snapped == codes[name]).float().mean() > 0.999  # but for ties
    with pytest.raises(SpecError, match=r"no latent weights of Q0 are kept in patch\.start: set"):
        patch(run, spec=latent, **given)


def test_a_latent_start_is_refused_where_no_latents_are_kept() -> None:
    latent = PatchSpec(start="latent")
    check_patchable(latent, LlmQatSpec(keep_latent=True))
    for quantizer in (LlmQatSpec(), RtnSpec(), Critical16Spec(base=LlmQatSpec())):
        with pytest.raises(SpecError, match=r"quantize\.keep_latent=true"):
            check_patchable(latent, quantizer)
    with pytest.raises(ValueError, match="start: latent is of method masked_lora"):
        PatchSpec(start="latent", method="flips")
    with pytest.raises(ValueError, match=r"leave out base\.keep_latent"):
        Critical16Spec(base=LlmQatSpec(keep_latent=True))


def test_what_nobody_asked_for_is_not_in_the_patchs_key() -> None:
    assert "start" not in key_spec(PatchSpec())
    assert key_spec(PatchSpec(start="latent"))["start"] == "latent"
